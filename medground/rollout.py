"""Prompt -> completions: prefill once per prompt, decode G rows.

Every row's random numbers depend on (run seed, step, record id, completion index) alone, so the same
completions come out whatever the batch or the number of ranks. Of the model's own generation_config only the
stop tokens are used: tokens come from exactly the distribution that the loss assumes, but that image and video
tokens are never drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from medground.records import Group, Prompt, Rollout
from medground_kernels.sample_token import sample_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medground.policy import Policy


def roll_out(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    copies: int,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    step: int = 0,
) -> list[Group]:
    """Sample completions. The weights must be whole: call it inside `sharding.gathered`.

    Args:
        policy: what samples.
        tokenizer: of the policy's model folder.
        prompts: B of them.
        copies: completions per prompt (G).
        max_new_tokens: longest completion, in tokens.
        temperature: > 0 to sample, 0 for greedy.
        seed: of the run.
        step: of the run; another step draws other completions.

    Returns:
        B groups of G completions, in the order of `prompts`.
    """
    device = policy.vlm.lm_head.weight.device
    names = [f"{seed}/{step}/{prompt.example.id}/{i}" for prompt in prompts for i in range(copies)]
    seeds = torch.tensor([_stream(name) for name in names], device=device)
    banned = torch.tensor(policy.never_sampled, device=device)
    stop = torch.tensor(_stop_tokens(policy, tokenizer), device=device)

    logits, state = policy.prefill(prompts, copies)
    running = torch.ones(len(seeds), dtype=torch.bool, device=device)
    tokens, logps, alive = [], [], []
    for position in range(max_new_tokens):
        # full_logp: the loss knows nothing of the banned tokens
        token, _, logp = sample_token(logits, temperature=temperature, seeds=seeds, step=position, banned=banned)
        tokens.append(token)
        logps.append(logp)
        alive.append(running)
        running = running & ~torch.isin(token, stop)
        if position + 1 == max_new_tokens or not running.any():
            break
        logits, state = policy.decode(token, state)

    token_rows, logp_rows = torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu()
    lengths, finished = torch.stack(alive, 1).sum(1).tolist(), (~running).tolist()
    rollouts = [
        Rollout(
            tokens=token_rows[row, :length].clone(),
            logp=logp_rows[row, :length].clone(),
            # a special token within the completion is part of what was said; the one that ends it is not
            text=tokenizer.decode(token_rows[row, : length - done]),
            finished=done,
        )
        for row, (length, done) in enumerate(zip(lengths, finished, strict=True))
    ]
    return [Group(prompt, tuple(rollouts[b * copies : (b + 1) * copies])) for b, prompt in enumerate(prompts)]


def _stop_tokens(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    model = (policy.vlm.config.text_config.eos_token_id, policy.vlm.generation_config.eos_token_id)
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, *model):
        found |= set(ids) if isinstance(ids, list) else {ids} - {None}
    return sorted(found)


def _stream(name: str) -> int:
    # 63 bits: the key of a Philox stream, as a non-negative int64
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
