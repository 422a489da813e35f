"""token_logprob: forward, and forward with the backward pass written into the logits."""

import pytest
import torch

from bench import peers_logits as peers
from bench.race import Contender, against, copy_floor
from bench.timing import synced_clock
from bench.workloads import CUDA, Shape, logprob_truth, make_logits
from medground_kernels.token_logprob import token_logprob

pytestmark = pytest.mark.benchmark(timer=synced_clock)

SHAPES = (
    [Shape(N, 0, V, torch.bfloat16) for N in (1600, 8192) for V in (151_936, 152_064)]
    if CUDA
    else [Shape(256, 0, 32_000, torch.float32), Shape(64, 0, 151_936, torch.bfloat16)]
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(race, shape):
    logits, targets = make_logits(shape.N, shape.V, shape.dtype)

    def ours():
        with torch.no_grad():
            return token_logprob(logits, targets)._asdict()

    contenders = {
        "ours": Contender(lambda: ours),
        "torch": peers.torch_token_logprob(logits, targets, None),
        "TRL": peers.trl_token_logprob(logits, targets, None),
    }
    if not CUDA or shape.V == 151_936:  # for the other it would compile again, the same
        contenders["torch.compile"] = peers.torch_token_logprob(logits, targets, None, compiled=True)
    judge = against(logprob_truth(logits, targets, None))
    floor = copy_floor(logits.nbytes)
    race("token_logprob forward", shape, contenders, judge, dtype=shape.dtype, floor=floor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_in_place(race, shape):
    logits, targets = make_logits(shape.N, shape.V, shape.dtype)
    dlogp = torch.linspace(-1, 1, shape.N, device=logits.device)
    work = logits.detach().clone().requires_grad_()

    def ours():
        logp, _ = token_logprob(work, targets, inplace_backward=True)
        return {"logp": logp.detach(), "dlogits": torch.autograd.grad(logp, work, dlogp)[0]}

    contenders = {
        "ours": Contender(lambda: ours, prepare=lambda: work.data.copy_(logits.detach())),
        "torch": peers.torch_token_logprob(logits, targets, dlogp),
        "TRL": peers.trl_token_logprob(logits, targets, dlogp),
    }
    if not CUDA or shape.V == 151_936:
        contenders["torch.compile"] = peers.torch_token_logprob(logits, targets, dlogp, compiled=True)
    judge = against(logprob_truth(logits, targets, dlogp))
    floor = copy_floor(3 * logits.nbytes)  # read, read, write
    race("token_logprob forward + in-place backward", shape, contenders, judge, dtype=shape.dtype, floor=floor)
