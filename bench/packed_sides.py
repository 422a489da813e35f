"""The two sides of `bench.packed`: one group through our code and through transformers' padded rows.

Both models have the very same weights, so that gradients land in the same place.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from bench.random_model import (
    ARCHITECTURES,
    SIZES,
    Architecture,
    Size,
    make_config,
    make_groups,
    make_processor,
    make_prompts,
    make_vlm,
    policy_of,
)
from bench.unpacked import pad_rows, unpacked_logp
from medground.packing import pack
from medground.policy import Policy
from medground.prompts import Processor
from medground.records import Group, Prompt
from medground.rollout.cache import Sampling
from medground.rollout.engine import Engine, Limits
from medground_kernels.grpo_options import GrpoOptions

OPTIONS = GrpoOptions(loss_type="dapo", beta=0.0)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Most that the sides may differ: in float32 every log-probability, in bfloat16, where single ones stray, their root
mean square."""


@dataclass(frozen=True)
class Case:
    """A model, prompts, and the first one's group."""

    name: str
    shape: Architecture
    size: Size
    processor: Processor
    vlm: Qwen2_5_VLForConditionalGeneration  # theirs
    policy: Policy  # ours
    prompts: list[Prompt]
    group: Group
    advantages: Tensor  # [G]
    old_logp: Tensor  # [G * C]

    @property
    def device(self) -> torch.device:
        return self.policy.device


def make_case(name: str, device: torch.device, prompts: int = 8) -> Case:
    """A model by its name, at its usual size."""
    shape, size = ARCHITECTURES[name], SIZES[name]
    return case_of(name, shape, size, make_model(shape, device), prompts)


def make_model(shape: Architecture, device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights: bfloat16 on CUDA, float32 on a CPU."""
    config = make_config(
        shape, make_processor(shape.V, SIZES["tiny"])
    )  # which asks for the ids of special tokens alone
    return make_vlm(config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def case_of(
    name: str, shape: Architecture, size: Size, vlm: Qwen2_5_VLForConditionalGeneration, prompts: int = 1
) -> Case:
    """A model's prompts and group of any size; completions are random tokens, the old policy is 10 % off."""
    processor, policy = make_processor(shape.V, size), policy_of(vlm)
    asked = make_prompts(processor, size, prompts)
    (group,) = make_groups(asked[:1], shape.V, size)
    generator = torch.Generator().manual_seed(1)
    advantages, noise = (torch.randn(n, generator=generator).to(policy.device) for n in (size.G, size.G * size.C))
    case = Case(name, shape, size, processor, vlm, policy, asked, group, advantages, noise)
    return replace(case, old_logp=our_score(case, [group]) + 0.1 * noise)


def separate(case: Case, image_once: bool) -> list[Group]:
    """The case's group as G groups of one completion."""
    prompt = case.group.prompt
    (key,) = prompt.image_keys
    return [
        Group(replace(prompt, image_keys=(key if image_once else f"{key}/{g}",)), (rollout,))
        for g, rollout in enumerate(case.group.rollouts)
    ]


def our_loss(case: Case, groups: list[Group]) -> Tensor:
    """Of the case's group, as it is or separated."""
    packed = pack(groups, case.vlm.config, case.device)
    return case.policy.loss(
        packed, case.advantages, old_logp=case.old_logp, ref_logp=None, options=OPTIONS,
        total_tokens=len(packed.targets)
    ).loss  # fmt: skip


def their_loss(case: Case) -> Tensor:
    """The same of padded rows."""
    logp = _their_logp(case, case.group)
    advantage = case.advantages.repeat_interleave(case.size.C)
    ratio = (logp - case.old_logp).exp()
    clipped = ratio.clamp(1 - OPTIONS.epsilon_low, 1 + OPTIONS.epsilon_high)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


@torch.no_grad()
def our_score(case: Case, groups: list[Group]) -> Tensor:
    """Log-probabilities [G * C]."""
    return case.policy(pack(groups, case.vlm.config, case.device), 1.0).logp


@torch.no_grad()
def their_score(case: Case) -> Tensor:
    """The same of padded rows."""
    return _their_logp(case, case.group)


def _their_logp(case: Case, group: Group) -> Tensor:
    return unpacked_logp(case.vlm, pad_rows([group], case.vlm.config.image_token_id, case.device), 1.0)


def make_engine(case: Case, prompts: int) -> Engine:
    """Decodes all completions of as many prompts at once."""
    return Engine(case.policy, case.processor.tokenizer, limits_of(case, prompts))


def limits_of(case: Case, prompts: int) -> Limits:
    """What that takes."""
    P, _, G, C = case.size
    return Limits(P, C, max_rows=prompts * G, cache_bytes=16e9, prefill_tokens=prompts * P)


def our_rollout(case: Case, engine: Engine, prompts: int) -> list[Group]:
    """Groups of the first prompts."""
    found = engine.roll_out(case.prompts[:prompts], count=prompts, copies=case.size.G, sampling=Sampling(1.0))
    return [group for _, group in sorted(found, key=lambda pair: pair[0])]


@torch.no_grad()
def their_rollout(case: Case) -> Tensor:
    """Completions [G, C] of the first prompt."""
    prompt, device = case.prompts[0], case.device
    ids = prompt.input_ids[None].to(device)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=case.size.G,
        max_new_tokens=case.size.C,
        pad_token_id=case.vlm.config.text_config.pad_token_id,
    )
    out = case.vlm.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == case.vlm.config.image_token_id).int(),
        pixel_values=prompt.pixel_values.to(device, case.vlm.dtype),
        image_grid_thw=prompt.image_grid_thw.to(device),
        generation_config=sampling,
    )
    return out[:, ids.shape[1] :]


class Agreement(NamedTuple):
    """How far the two sides are apart.

    Attributes:
        logp: the largest difference of log-probabilities.
        logp_rms: root mean square of the differences.
        rollout_logp_rms: the same of what came with sampled tokens and what rows give for them.
        loss: difference of the losses.
        grad: of all gradients together, root mean square over theirs; None in bfloat16, where nothing is to spare.
    """

    logp: float
    logp_rms: float
    rollout_logp_rms: float
    loss: float
    grad: float | None


def check(case: Case) -> Agreement:
    """See that both sides compute the same, and that roll-outs are of full length.

    Raises:
        ValueError: they do not, or are not.
    """
    (sampled,) = our_rollout(case, make_engine(case, 1), 1)
    lengths = {len(r.tokens) for r in sampled.rollouts} | {their_rollout(case).shape[1]}
    if lengths != {case.size.C}:
        raise ValueError(f"want completions of {case.size.C} tokens on both sides; got {sorted(lengths)}")
    exact = case.vlm.dtype == torch.float32
    logp = our_score(case, [case.group]) - their_score(case)
    with torch.no_grad():
        gap = torch.cat([r.logp for r in sampled.rollouts]).to(case.device) - _their_logp(case, sampled)
        loss = float(our_loss(case, [case.group]) - their_loss(case))
    grad = _gradient_gap(case) if exact else None
    found = Agreement(float(logp.abs().max()), _rms(logp), _rms(gap), abs(loss), grad)
    compared = (found.logp if exact else found.logp_rms, found.rollout_logp_rms, found.loss, grad or 0.0)
    if not all(value <= CLOSE[case.vlm.dtype] for value in compared):
        raise ValueError(f"want both sides to agree within {CLOSE[case.vlm.dtype]}; got {found}")
    return found


def _gradient_gap(case: Case) -> float:
    clear(case)
    their_loss(case).backward()
    theirs = {weight: weight.grad for weight in case.policy.parameters()}
    clear(case)
    our_loss(case, [case.group]).backward()
    off = sum(float((weight.grad - grad).double().square().sum()) for weight, grad in theirs.items())
    size = sum(float(grad.double().square().sum()) for grad in theirs.values())
    clear(case)
    return (off / size) ** 0.5


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def clear(case: Case) -> None:
    """Forget gradients."""
    case.policy.zero_grad(set_to_none=True)
