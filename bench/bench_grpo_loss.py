"""grpo_loss: the loss of log-probabilities, all launch cost; and from logits, together with token_logprob."""

import pytest
import torch

from bench import peers_logits as peers
from bench.race import Contender, against, copy_floor
from bench.timing import synced_clock
from bench.workloads import CUDA, OPTIONS, Batch, Shape, logprob_truth, make_batch
from medground_kernels.grpo_loss import grpo_loss, grpo_loss_reference
from medground_kernels.token_logprob import token_logprob

pytestmark = pytest.mark.benchmark(timer=synced_clock)

LOGITS = Shape(1600, 64, 151_936, torch.bfloat16) if CUDA else Shape(256, 64, 32_000, torch.float32)


def keywords(batch: Batch) -> dict:
    return {
        "old_logp": batch.old_logp,
        "ref_logp": batch.ref_logp,
        "options": OPTIONS,
        "total_tokens": batch.shape.N,
    }


def loss_truth(logp: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    logp = logp.detach().double().requires_grad_()
    loss = grpo_loss_reference(logp, batch.advantages.double(), batch.cu_seqlens, **keywords(batch)).loss
    return {"loss": loss.detach(), "dlogp": torch.autograd.grad(loss, logp)[0]}


@pytest.mark.parametrize("N", [1600, 8192])
def test_from_log_probabilities(race, N):
    batch = make_batch(Shape(N, 64, 1024, torch.float32))
    logp = (batch.old_logp + 0.1 * torch.randn_like(batch.old_logp)).requires_grad_()

    def ours():
        loss = grpo_loss(logp, batch.advantages, batch.cu_seqlens, **keywords(batch)).loss
        return {"loss": loss.detach(), **peers.gradients(loss, {"dlogp": logp})}

    contenders = {
        "ours": Contender(lambda: ours),
        "torch": peers.torch_loss(logp, batch),
        "torch.compile": peers.torch_loss(logp, batch, compiled=True),
        "TRL": peers.trl_loss(logp, batch),
    }
    race(
        "grpo_loss", f"N {N} S {len(batch.advantages)}", contenders, against(loss_truth(logp, batch)), dtype=logp.dtype
    )


def test_from_logits(race):
    batch = make_batch(LOGITS)
    logits = (batch.hidden @ batch.weight.T).detach().requires_grad_()
    work = logits.detach().clone().requires_grad_()

    def ours():
        logp, entropy = token_logprob(work, batch.targets, inplace_backward=True)
        loss = grpo_loss(logp, batch.advantages, batch.cu_seqlens, entropy=entropy.detach(), **keywords(batch)).loss
        return {"loss": loss.detach(), **peers.gradients(loss, {"dlogits": work})}

    contenders = {
        "ours": Contender(lambda: ours, prepare=lambda: work.data.copy_(logits.detach())),
        "torch": peers.torch_logits_grpo(logits, batch),
        "torch.compile": peers.torch_logits_grpo(logits, batch, compiled=True),
        "TRL": peers.trl_logits_grpo(logits, batch),
        "Liger": peers.liger_logits_grpo(logits, batch),
    }
    loss = loss_truth(logprob_truth(logits, batch.targets, None)["logp"], batch)
    truth = logprob_truth(logits, batch.targets, loss["dlogp"]) | loss
    floor = copy_floor(3 * logits.nbytes)
    workload = Shape(LOGITS.N, 0, LOGITS.V, LOGITS.dtype)
    race("token_logprob + grpo_loss", workload, contenders, against(truth), dtype=LOGITS.dtype, floor=floor)
