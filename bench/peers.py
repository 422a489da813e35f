"""Who we are measured against. Each function takes the inputs and gives a `Contender`.

Peers run as their own callers call them, at their defaults. What they demand is done for them outside the clock where
it is a matter of layout (padding [N] to [S, T] is not, in a trainer that pads anyway), and what they would do beside
the work is left out: TRL's loss runs without its metrics, the plain losses without any statistics, while ours makes
them all. TRL's wheel alone is enough: its backward asks `trl.trainer.utils` for a context manager that gathers ZeRO-3
parameters, a null context here, and where that module cannot import accelerate and datasets, a stand-in gives it.
"""

import importlib
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from bench.race import Contender, Result, UnavailableError
from bench.workloads import CUDA, OPTIONS, Batch

TRL_CHUNK = 32_768  # columns; trl/trainer/utils.py


def load(module: str) -> types.ModuleType:
    """A peer's module; UnavailableError where it is not installed."""
    try:
        if module.startswith("trl."):
            _need_trl_utils()
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"not installed: {error}") from error


def _need_trl_utils() -> None:
    try:
        importlib.import_module("trl.trainer.utils")
    except ImportError:  # of what TRL's trainer needs and its loss does not
        stub = types.ModuleType("trl.trainer.utils")
        stub.maybe_gather_lm_head_ctx = lambda *_: nullcontext()
        sys.modules["trl.trainer.utils"] = stub


def needs_cuda() -> None:
    if not CUDA:
        raise UnavailableError("a Triton kernel; needs CUDA")


def picked(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability as most trainers compute it."""
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def picked_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def per_token_loss(logp: Tensor, advantage: Tensor, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The usual objective, as in TRL 1.16's `GRPOTrainer._compute_loss`, any shape."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - OPTIONS.epsilon_low, 1 + OPTIONS.epsilon_high)
    d = ref_logp - logp
    return -torch.min(ratio * advantage, clipped * advantage) + OPTIONS.beta * (d.exp() - d - 1)


class Padded:
    """A batch as padding trainers hold it: [S, T], T the longest sequence."""

    def __init__(self, batch: Batch):
        lengths = batch.cu_seqlens.diff()
        self.mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        self.targets, self.old, self.ref = (self.pad(t) for t in (batch.targets, batch.old_logp, batch.ref_logp))
        self.advantages = batch.advantages

    def pad(self, flat: Tensor) -> Tensor:
        padded = flat.new_zeros(*self.mask.shape, *flat.shape[1:])
        padded[self.mask] = flat.detach()
        return padded

    def loss(self, logp: Tensor) -> Tensor:
        """TRL's dapo loss of padded log-probabilities."""
        terms = per_token_loss(logp, self.advantages[:, None], self.old, self.ref)
        return (terms * self.mask).sum() / self.mask.sum().clamp(min=1.0)


def gradients(loss: Tensor, needed: dict[str, Tensor], upstream: Tensor | None = None) -> Result:
    """By name; upstream is the gradient of `loss`."""
    return dict(zip(needed, torch.autograd.grad(loss, list(needed.values()), upstream), strict=True))


def torch_grpo(batch: Batch, compiled: bool = False) -> Contender:
    """Full logits, float32 log-softmax, gather, loss; autograd for the rest."""

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor, advantage: Tensor, old: Tensor, ref: Tensor) -> Tensor:
        return per_token_loss(picked(hidden @ weight.T, targets), advantage, old, ref).mean()

    def build() -> Callable[[], Result]:
        step = torch.compile(forward) if compiled else forward
        advantage = batch.advantages.repeat_interleave(batch.cu_seqlens.diff().long())

        def call() -> Result:
            loss = step(batch.hidden, batch.weight, batch.targets, advantage, batch.old_logp, batch.ref_logp)
            return {"loss": loss.detach(), **gradients(loss, batch.needed())}

        return call

    return Contender(build)


def _trl_chunked(batch: Batch, outputs: tuple[str, ...]) -> Callable[[], Tensor]:
    chunked = load("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    return lambda: chunked.apply(
        batch.hidden, batch.weight, None, batch.targets, 1.0, TRL_CHUNK, None, 1.0, ("log_probs", *outputs)
    )[0]


def trl_grpo(batch: Batch) -> Contender:
    """Chunked log-probabilities and entropy, which its trainer always asks for, scattered to [S, T]; then its loss."""

    def build() -> Callable[[], Result]:
        scored, padded = _trl_chunked(batch, ("entropy",)), Padded(batch)

        def call() -> Result:
            logp = scored()
            loss = padded.loss(logp.new_zeros(padded.mask.shape).masked_scatter(padded.mask, logp))
            return {"loss": loss.detach(), **gradients(loss, batch.needed())}

        return call

    return Contender(build)


def liger_grpo(batch: Batch) -> Contender:
    """`LigerFusedLinearGRPOLoss` from padded hidden states [S, T, H], the only layout it takes."""

    def build() -> Callable[[], Result]:
        loss_of = load("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(beta=OPTIONS.beta, loss_type="dapo")
        padded = Padded(batch)
        hidden = padded.pad(batch.hidden).requires_grad_()
        needed = batch.needed() | {"dhidden": hidden}

        def call() -> Result:
            loss, _ = loss_of(
                hidden, batch.weight, padded.targets, padded.mask, padded.advantages,
                ref_per_token_logps=padded.ref, old_per_token_logps=padded.old
            )  # fmt: skip
            grads = gradients(loss, needed)
            return {"loss": loss.detach(), **grads, "dhidden": lambda: grads["dhidden"][padded.mask]}

        return call

    return Contender(build)


def torch_logprob(batch: Batch, dlogp: Tensor, compiled: bool = False) -> Contender:
    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return picked(hidden @ weight.T, targets)

    def build() -> Callable[[], Result]:
        step = torch.compile(forward) if compiled else forward
        return _backward(lambda: step(batch.hidden, batch.weight, batch.targets), batch, dlogp)

    return Contender(build)


def trl_logprob(batch: Batch, dlogp: Tensor) -> Contender:
    return Contender(lambda: _backward(_trl_chunked(batch, ()), batch, dlogp))


def cut_cross_entropy(batch: Batch, dlogp: Tensor) -> Contender:
    """`linear_cross_entropy(reduction="none")` at its defaults, which filter the gradient."""

    def build() -> Callable[[], Result]:
        needs_cuda()
        loss_of = load("cut_cross_entropy").linear_cross_entropy
        return _backward(lambda: -loss_of(batch.hidden, batch.weight, batch.targets, reduction="none"), batch, dlogp)

    return Contender(build)


def _backward(scored: Callable[[], Tensor], batch: Batch, dlogp: Tensor) -> Callable[[], Result]:
    def call() -> Result:
        logp = scored()
        return {"logp": logp.detach(), **gradients(logp, batch.needed(), dlogp.to(logp.dtype))}

    return call
