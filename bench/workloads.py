"""What the benchmarks run on: the same inputs for everybody, from fixed seeds.

Logits look like a language model's: a normal spread of 3.5 on top of a Zipf prior over the vocabulary, and the
targets are sampled from them. On flat random inputs cut-cross-entropy could not filter its gradient, and would look
slower than it is. Sequences come in groups of 8 and are 20 to 200 tokens long.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medground_kernels.grpo_loss import GrpoOptions, grpo_loss_reference
from medground_kernels.token_logprob import token_logprob_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

OPTIONS = GrpoOptions(loss_type="dapo", beta=0.04)
"""What every peer can compute too: token ratio, clip 0.2, k3."""

SPREAD = 3.5
_ROWS = 1024  # whose float64 logits are in memory at once


class Shape(NamedTuple):
    """N scored tokens, hidden size H (0 where there is none), vocabulary V."""

    N: int
    H: int
    V: int
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = " ".join(f"{name} {size}" for name, size in zip("NHV", self[:3], strict=True) if size)
        return f"{sizes} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Batch:
    """One update's tokens; `hidden` and `weight` require gradients unless the head is frozen."""

    shape: Shape
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    advantages: Tensor  # [S]
    cu_seqlens: Tensor  # [S+1]
    old_logp: Tensor  # [N]
    ref_logp: Tensor  # [N]

    def frozen(self) -> "Batch":
        return Batch(**{**vars(self), "weight": self.weight.detach()})

    def needed(self) -> dict[str, Tensor]:
        """What a gradient is asked for, by the gradient's name."""
        return {f"d{n}": t for n, t in (("hidden", self.hidden), ("weight", self.weight)) if t.requires_grad}


def sequence_lengths(N: int, seed: int = 0) -> list[int]:
    """Lengths from 20 to 200 of 8, 16, 24 ... sequences, N in all."""
    S = 8 * max(1, round(N / 880))
    if not 20 * S <= N <= 200 * S:
        raise ValueError(f"want N that {S} sequences of 20 to 200 tokens can hold; got {N}")
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 201, (S,), generator=generator)
    while (off := N - int(lengths.sum())) != 0:
        free = (lengths < 200) if off > 0 else (lengths > 20)
        some = free.nonzero()[:, 0][torch.randperm(int(free.sum()), generator=generator)[: abs(off)]]
        lengths[some] += 1 if off > 0 else -1
    return lengths.tolist()


def make_logits(N: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [N, V], which require a gradient, and targets [N] sampled from them."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.empty((N, V), dtype=dtype, device=DEVICE)
    prior = _prior(V, generator)
    targets = []
    for rows in _blocks(N):
        z = SPREAD * torch.randn((len(logits[rows]), V), generator=generator, device=DEVICE) + prior
        logits[rows] = z
        targets.append(_sample(z, generator))
    return logits.requires_grad_(), torch.cat(targets)


def make_batch(shape: Shape, seed: int = 0) -> Batch:
    """Hidden states and a head that give such logits; the old policy is 10 % off, the reference 20 %."""
    N, H, V, dtype = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    hidden, weight = noise(N, H), noise(V, H) * (SPREAD / (H - 1) ** 0.5)
    hidden[:, 0], weight[:, 0] = 1.0, _prior(V, generator)  # one coordinate carries the prior
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = torch.cat([_sample((hidden[rows] @ weight.T).float(), generator) for rows in _blocks(N)])
    lengths = torch.tensor([0, *sequence_lengths(N, seed)], device=DEVICE)
    rewards = noise(len(lengths) // 8, 8)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    wide = weight.double()
    logp = torch.cat([token_logprob_reference(hidden[r].double() @ wide.T, targets[r]).logp for r in _blocks(N)])
    return Batch(
        shape, hidden.requires_grad_(), weight.requires_grad_(), targets, advantages.flatten(),
        lengths.cumsum(0).int(), (logp + 0.1 * noise(N)).float(), (logp + 0.2 * noise(N)).float()
    )  # fmt: skip


def logprob_truth(logits: Tensor, targets: Tensor, dlogp: Tensor | None) -> dict[str, Tensor]:
    """Log-probability, entropy and, given that of the log-probability, gradient of `logits`; all rows, in float64."""
    parts = []
    for rows in _blocks(len(logits)):
        z = logits.detach()[rows].double().requires_grad_()
        logp, entropy = token_logprob_reference(z, targets[rows])
        part = {"logp": logp.detach(), "entropy": entropy.detach()}
        if dlogp is not None:  # rounded to float32, so that a large one fits beside the inputs
            part["dlogits"] = torch.autograd.grad(logp, z, dlogp[rows].double())[0].float()
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def linear_truth(batch: Batch, dlogp: Tensor | None = None) -> dict[str, Tensor]:
    """In float64, on all rows, in blocks of whole sequences: the GRPO loss and its gradients (dapo is a sum over
    tokens, so blocks add up), or, given `dlogp`, log-probabilities and theirs.
    """
    starts = batch.cu_seqlens.tolist()
    weight = batch.weight.detach().double().requires_grad_(batch.weight.requires_grad)
    dweight, parts = torch.zeros_like(weight), []
    for first, last in _sequence_blocks(starts):
        rows = slice(starts[first], starts[last])
        hidden = batch.hidden.detach()[rows].double().requires_grad_()
        logp = token_logprob_reference(hidden @ weight.T, batch.targets[rows]).logp
        loss = logp.sum() * 0 if dlogp is None else (logp * dlogp[rows].double()).sum()
        if dlogp is None:
            loss = grpo_loss_reference(
                logp, batch.advantages[first:last].double(), batch.cu_seqlens[first : last + 1] - starts[first],
                old_logp=batch.old_logp[rows].double(), ref_logp=batch.ref_logp[rows].double(),
                options=OPTIONS, total_tokens=batch.shape.N
            ).loss  # fmt: skip
        grads = torch.autograd.grad(loss, [hidden, weight] if weight.requires_grad else [hidden])
        if weight.requires_grad:
            dweight += grads[1]
        parts.append({"loss": loss.detach()[None], "logp": logp.detach(), "dhidden": grads[0]})
    truth = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    truth["loss"] = truth["loss"].sum()
    return truth | ({"dweight": dweight.detach()} if weight.requires_grad else {})


def _sequence_blocks(starts: list[int]) -> list[tuple[int, int]]:
    blocks, first = [], 0
    for last in range(1, len(starts)):
        if starts[last] - starts[first] >= _ROWS or last == len(starts) - 1:
            blocks.append((first, last))
            first = last
    return blocks


def _blocks(N: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, N)) for start in range(0, N, _ROWS)]


def _prior(V: int, generator: torch.Generator) -> Tensor:
    rank = torch.randperm(V, generator=generator, device=DEVICE) + 1
    return -rank.float().log() + torch.arange(1, V + 1, device=DEVICE).float().log().mean()


def _sample(z: Tensor, generator: torch.Generator) -> Tensor:
    exponential = torch.empty_like(z).exponential_(generator=generator)
    return (z - exponential.log_()).argmax(-1)
