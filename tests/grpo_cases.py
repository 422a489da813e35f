"""Made-up batches and options for the tests of the GRPO loss."""

from typing import Any

import torch
from hypothesis import strategies as st

from medground_kernels.grpo_options import GrpoOptions


def cast(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with every floating tensor in `dtype`."""
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in values.items()}


def lengths_of(seed: int, S: int, longest: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (S,), generator=generator, device="cpu").tolist()
    return [1 if seed % 3 == 0 else lengths[0], *lengths[1:]]


def per_token(lengths: list[int], *, masked: bool, scale: float = 0.4) -> dict[str, Any]:
    """Log-probabilities, advantages and bounds of sequences; a third of the tokens masked, one sequence whole."""
    N, S = sum(lengths), len(lengths)
    logp = -torch.rand(N) * 3
    targets = torch.randint(0, 50, (N,))
    if masked:
        targets[1::3] = -1
        targets[: lengths[0]] = -100
    return {
        "logp": logp,
        "advantages": torch.randn(S),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "targets": targets if masked else None,
        "old_logp": logp + torch.randn(N) * scale,
        "ref_logp": logp + torch.randn(N) * scale,
        "entropy": torch.rand(N) * 2,
    }


@st.composite
def options(draw: st.DrawFn) -> GrpoOptions:
    """Any options that make sense together."""
    loss_type = draw(st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]))
    bound = draw(st.sampled_from([None, "delta", "dual_clip"])) if loss_type not in ("cispo", "sapo") else None
    return GrpoOptions(
        loss_type=loss_type,
        ratio_level=draw(st.sampled_from(["token", "sequence"])),
        epsilon_low=draw(st.sampled_from([0.0, 0.1, 0.3])),
        epsilon_high=draw(st.sampled_from([0.15, 0.4, 1.3])),
        delta=draw(st.sampled_from([0.9, 1.2, 1.8])) if bound == "delta" else None,
        dual_clip=draw(st.sampled_from([1.05, 1.6])) if bound == "dual_clip" else None,
        beta=draw(st.sampled_from([0.0, 0.3])),
        kl=draw(st.sampled_from(["k1", "k2", "k3"])),
        kl_ratio=draw(st.booleans()),
        entropy_coef=draw(st.sampled_from([0.0, 0.2, -0.1])),
        temperature=draw(st.sampled_from([1.0, 0.6])),
        max_completion_length=9,
        sapo_temperature_pos=draw(st.sampled_from([1.0, 0.7])),
        sapo_temperature_neg=draw(st.sampled_from([1.05, 2.0])),
    )
