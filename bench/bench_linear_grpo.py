"""linear_grpo: from hidden states to the loss and its gradients, with a head that learns and a frozen one."""

import pytest
import torch

from bench import peers
from bench.race import Contender, against, product_floor
from bench.timing import synced_clock
from bench.workloads import CUDA, OPTIONS, Batch, Shape, linear_truth, make_batch
from medground_kernels.linear_grpo import linear_grpo

pytestmark = pytest.mark.benchmark(timer=synced_clock)

HEADS = ((2048, 151_936), (3584, 152_064))  # Qwen2.5-VL 3B, 7B
SHAPES = (
    [Shape(N, H, V, torch.bfloat16) for N in (1600, 8192) for H, V in HEADS]
    if CUDA
    else [Shape(1024, 512, 32_000, torch.float32)]  # the CPU's bar
)
SMALL_BUDGET = 150_000_000 if CUDA else 16_000_000  # bytes


def ours(batch: Batch, memory_budget: int | None = None) -> Contender:
    def call():
        out = linear_grpo(
            batch.hidden, batch.weight, batch.targets, batch.advantages, batch.cu_seqlens, old_logp=batch.old_logp,
            ref_logp=batch.ref_logp, options=OPTIONS, total_tokens=batch.shape.N, memory_budget=memory_budget
        )  # fmt: skip
        return {"loss": out.loss.detach(), "logp": out.logp, **peers.gradients(out.loss, batch.needed())}

    return Contender(lambda: call)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_learns(race, shape):
    batch = make_batch(shape)
    contenders = {
        "ours": ours(batch),
        "ours, small budget": ours(batch, SMALL_BUDGET),
        "torch": peers.torch_grpo(batch),
        "torch.compile": peers.torch_grpo(batch, compiled=True),
        "TRL": peers.trl_grpo(batch),
        "Liger": peers.liger_grpo(batch),
    }
    judge = against(linear_truth(batch))
    floor = product_floor(*shape, names=("logits", "dhidden", "dweight"))
    race("linear_grpo", shape, contenders, judge, dtype=shape.dtype, floor=floor, budget=0.5 if CUDA else 8)


@pytest.mark.parametrize("shape", SHAPES[-1:] if CUDA else [Shape(512, 256, 32_000, torch.float32)], ids=str)
def test_head_frozen(race, shape):
    batch = make_batch(shape).frozen()
    contenders = {
        "ours": ours(batch),
        "torch": peers.torch_grpo(batch),
        "TRL": peers.trl_grpo(batch),
        "Liger": peers.liger_grpo(batch),
    }
    judge = against(linear_truth(batch))
    floor = product_floor(*shape, names=("logits", "dhidden"))
    race("linear_grpo, frozen head", shape, contenders, judge, dtype=shape.dtype, floor=floor)
