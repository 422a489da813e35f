"""linear_logprob: forward and backward from hidden states, for a method of your own on top of log-probabilities."""

import pytest
import torch

from bench import peers
from bench.race import Contender, against, product_floor
from bench.timing import synced_clock
from bench.workloads import CUDA, Shape, linear_truth, make_batch
from medground_kernels.linear_logprob import linear_logprob

pytestmark = pytest.mark.benchmark(timer=synced_clock)

SHAPES = (
    [Shape(1600, 2048, 151_936, torch.bfloat16), Shape(8192, 3584, 152_064, torch.bfloat16)]
    if CUDA
    else [Shape(512, 256, 32_000, torch.float32)]
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(race, shape):
    batch = make_batch(shape)
    dlogp = torch.linspace(-1, 1, shape.N, device=batch.hidden.device)

    def ours():
        logp, _ = linear_logprob(batch.hidden, batch.weight, batch.targets)
        return {"logp": logp.detach(), **peers.gradients(logp, batch.needed(), dlogp)}

    contenders = {
        "ours": Contender(lambda: ours),
        "torch": peers.torch_logprob(batch, dlogp),
        "torch.compile": peers.torch_logprob(batch, dlogp, compiled=True),
        "TRL": peers.trl_logprob(batch, dlogp),
        "CCE": peers.cut_cross_entropy(batch, dlogp),
    }
    judge = against(linear_truth(batch, dlogp))
    # without the logits in memory, backward makes them again
    floor = product_floor(*shape, names=("logits", "logits", "dhidden", "dweight"))
    race("linear_logprob", shape, contenders, judge, dtype=shape.dtype, floor=floor)
