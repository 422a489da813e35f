"""Rollouts against transformers' generate, a plain decode of one row at a time, and the training forward."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import IMAGE, STOPS, VIDEO, V, Words, made_group, made_prompt, policy_of, small_model

from medground.packing import pack
from medground.records import Group, Prompt
from medground.rollout import engine as module
from medground.rollout.cache import Sampling, bytes_per_token
from medground.rollout.engine import Engine, Limits, plan_cache
from medground_kernels.sample_token import sample_token_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VLM = small_model(seed=1).to(DEVICE)
POLICY = policy_of(VLM).to(DEVICE).requires_grad_(False)
TEXT = POLICY.vlm.config.text_config
PROMPTS = [
    made_prompt("a", [3, 4], [(2, 3)]),
    made_prompt("b", [6], seed=1),
    made_prompt("c", [1, 1, 9], [(4, 2), (1, 1)], seed=2),
    made_prompt("d", [2, 2], [(3, 3)], seed=3),
    made_prompt("e", [17], seed=4),
]
C = 12


def an_engine(policy=POLICY, **changes: float) -> Engine:
    limits = Limits(longest_prompt=64, max_new_tokens=C, max_rows=64, cache_bytes=1e9, prefill_tokens=1000)
    return Engine(policy, Words(), limits._replace(**changes))


def sample(engine: Engine, prompts=PROMPTS, copies=3, temperature=1.0, top_k=0, top_p=1.0, **changes) -> list[Group]:
    options = {"seed": 7, "step": 2} | changes
    sampling = Sampling(temperature, top_k, top_p)
    found = dict(engine.roll_out(iter(prompts), count=len(prompts), copies=copies, sampling=sampling, **options))
    return [found[i] for i in range(len(prompts))]


def one_row_at_a_time(prompt: Prompt, index: int, sampling: Sampling, limit: int = C) -> tuple[list[int], list[float]]:
    """Nothing cached, nothing shared: the whole sequence again for every token, as transformers runs it."""
    tokens: list[int] = []
    logps: list[float] = []
    seeds = torch.tensor([module._stream(f"7/2/{prompt.example.id}/{index}")], device=DEVICE)
    while len(tokens) < limit and not set(tokens) & set(STOPS):
        ids = torch.cat([prompt.input_ids, torch.tensor(tokens, dtype=torch.int64)])[None].to(DEVICE)
        images = {"pixel_values": prompt.pixel_values.to(DEVICE), "image_grid_thw": prompt.image_grid_thw.to(DEVICE)}
        logits = VLM(
            input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), **(images if len(prompt.image_grid_thw) else {})
        ).logits[:, -1]
        banned = torch.tensor(POLICY.never_sampled, device=DEVICE)
        drawn = sample_token_reference(logits, **sampling._asdict(), seeds=seeds, step=len(tokens), banned=banned)
        tokens.append(drawn.token.item())
        logps.append(drawn.full_logp.item())
    return tokens, logps


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.0), Sampling(0.6), Sampling(1.2, 9, 0.8)], ids=["1", "greedy", "0.6", "top"]
)
@torch.no_grad()
def test_the_same_tokens_as_one_row_at_a_time(sampling: Sampling):
    groups = sample(an_engine(max_rows=4), copies=3, **sampling._asdict())
    lengths = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for index, rollout in enumerate(group.rollouts):
            tokens, logps = one_row_at_a_time(prompt, index, sampling)
            assert rollout.tokens.tolist() == tokens
            torch.testing.assert_close(rollout.logp, torch.tensor(logps), atol=1e-5, rtol=0)
            lengths.add(len(tokens))
    assert len(lengths) > 2


@torch.no_grad()
def test_greedy_equals_generate():
    for prompt, group in zip(PROMPTS, sample(an_engine(), copies=1, temperature=0.0), strict=True):
        images = {"pixel_values": prompt.pixel_values.to(DEVICE), "image_grid_thw": prompt.image_grid_thw.to(DEVICE)}
        ids = prompt.input_ids[None].to(DEVICE)
        out = VLM.generate(
            input_ids=ids,
            mm_token_type_ids=(ids == IMAGE).int(),
            **(images if len(prompt.image_grid_thw) else {}),
            do_sample=False,
            max_new_tokens=C,
            suppress_tokens=POLICY.never_sampled,
            pad_token_id=0,
        )
        assert group.rollouts[0].tokens.tolist() == out[0, len(prompt.input_ids) :].tolist()


WANTED = {copies: sample(an_engine(), copies=copies) for copies in (1, 2, 5)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.permutations(range(len(PROMPTS))),
    st.sampled_from([1, 2, 5]),
    st.integers(1, 9),
    st.sampled_from([1, 30, 60]),
)
def test_the_same_completions_whatever_the_batch(order: list[int], copies: int, max_rows: int, prefill_tokens: int):
    engine = an_engine(max_rows=max_rows, prefill_tokens=prefill_tokens)
    groups = sample(engine, [PROMPTS[i] for i in order], copies)
    for i, group in zip(order, groups, strict=True):
        assert group.prompt is PROMPTS[i]
        for ours, want in zip(group.rollouts, WANTED[copies][i].rollouts, strict=True):
            assert torch.equal(ours.tokens, want.tokens) and ours.text == want.text and ours.finished == want.finished
            torch.testing.assert_close(ours.logp, want.logp, atol=1e-5, rtol=0)
    stats = engine.stats
    assert stats.prompt_tokens == sum(len(p.input_ids) for p in PROMPTS)
    assert stats.new_tokens == sum(len(r.tokens) for g in groups for r in g.rollouts)
    # rows that end leave at once: no slot is ever idle on a CPU, where no step runs ahead
    assert DEVICE.type == "cuda" or stats.slots == stats.new_tokens - copies * len(PROMPTS)
    assert stats.slots <= stats.steps * max_rows


def test_the_batch_stays_full():
    engine = an_engine(max_rows=4)
    groups = sample(engine, copies=4)
    tokens = sum(len(r.tokens) - 1 for g in groups for r in g.rollouts)
    longest = max(len(r.tokens) for r in groups[-1].rollouts)
    # but for the last rows to end, four rows are always under way
    assert engine.stats.steps <= math.ceil(tokens / 4) + longest + 1


def test_seeds_steps_and_copies_draw_apart():
    def long_ones(groups: list[Group]) -> list[str]:
        return [r.text for g in groups for r in g.rollouts if len(r.tokens) > 3]

    texts = long_ones(WANTED[5])
    assert len(set(texts)) == len(texts) > 9
    for changed in ({"seed": 8}, {"step": 3}):
        assert not set(texts) & set(long_ones(sample(an_engine(), copies=5, **changed)))


@torch.no_grad()
def test_logps_are_those_of_the_training_forward():
    for temperature in (1.0, 0.8):
        groups = sample(an_engine(), temperature=temperature)
        scored = POLICY(pack(groups, POLICY.vlm.config, DEVICE), temperature).logp.cpu()
        torch.testing.assert_close(scored, torch.cat([r.logp for g in groups for r in g.rollouts]), atol=1e-5, rtol=0)


def test_a_stop_token_ends_a_completion_and_the_limit_cuts_it():
    rollouts = [r for g in sample(an_engine(), copies=20) for r in g.rollouts]
    for rollout in rollouts:
        tokens = rollout.tokens.tolist()
        assert rollout.finished == (tokens[-1] in STOPS) and not set(tokens[:-1]) & set(STOPS)
        assert rollout.finished or len(tokens) == C
        assert rollout.text == " ".join(map(str, tokens[:-1] if rollout.finished else tokens))
    assert 0 < sum(r.finished for r in rollouts) < len(rollouts)


@pytest.mark.parametrize("max_rows", [2, 64])
def test_every_completion_may_have_a_limit_of_its_own(max_rows: int):
    """Benchmarks ask for it; up to its limit a completion is what it would have been."""
    wanted = {(p.example.id, i): 1 + (4 * n + 6 * i) % 13 for n, p in enumerate(PROMPTS) for i in range(3)}
    assert {1, C, C + 1} <= set(wanted.values())  # the engine's limit holds too
    whole, cut = (
        sample(an_engine(max_rows=max_rows), lengths=lengths)
        for lengths in (None, lambda prompt, index: wanted[prompt.example.id, index])
    )
    for group, short in zip(whole, cut, strict=True):
        for i, (rollout, other) in enumerate(zip(group.rollouts, short.rollouts, strict=True)):
            most = min(wanted[group.prompt.example.id, i], len(rollout.tokens))
            assert other.tokens.tolist() == rollout.tokens[:most].tolist()
            torch.testing.assert_close(other.logp, rollout.logp[:most], atol=1e-5, rtol=0)
            assert other.finished == (rollout.finished and most == len(rollout.tokens))


def test_completions_of_one_token():
    groups = sample(an_engine(max_new_tokens=1, max_rows=3), copies=4)
    for want, group in zip(WANTED[5], groups, strict=True):
        for ours, theirs in zip(group.rollouts, want.rollouts, strict=False):
            assert ours.tokens.tolist() == theirs.tokens[:1].tolist()


def test_rows_that_stop_at_once_leave_at_once():
    policy = policy_of(VLM).to(DEVICE).requires_grad_(False)
    policy.vlm.lm_head.weight.zero_()  # every token is as likely as any other
    policy.vlm.generation_config.eos_token_id = list(range(V))
    engine = an_engine(policy, max_rows=2)
    groups = sample(engine, copies=3)
    assert all(len(r.tokens) == 1 and r.finished for g in groups for r in g.rollouts)
    assert engine.stats.steps == 0


def test_image_tokens_are_never_sampled():
    policy = policy_of(VLM).to(DEVICE).requires_grad_(False)
    head = policy.vlm.lm_head.weight
    never = policy.never_sampled
    assert {IMAGE, VIDEO} < set(never)
    # whatever the hidden state, one of an opposite pair is likelier than all other tokens together
    head[never] = head.abs().max() * 50 * torch.tensor([1.0, -1.0] * 2, device=DEVICE)[: len(never), None]
    for group in sample(an_engine(policy), copies=4):
        for rollout in group.rollouts:
            assert not set(rollout.tokens.tolist()) & set(never)


def test_prompts_are_taken_as_there_is_room():
    taken: list[int] = []

    def coming() -> Iterator[Prompt]:
        for i, prompt in enumerate(PROMPTS):
            taken.append(i)
            yield prompt

    engine = an_engine(max_rows=1)
    found = engine.roll_out(coming(), count=len(PROMPTS), copies=1, sampling=Sampling(1.0), seed=7, step=2)
    number, group = next(found)
    assert number == 0 and group.prompt is PROMPTS[0] and len(taken) <= 3
    assert [number for number, _ in found] == [1, 2, 3, 4]


def test_a_cache_serves_calls_that_it_is_large_enough_for():
    engine = an_engine()
    sample(engine, copies=2)
    cache = engine._cache
    again = sample(engine, PROMPTS[:2], copies=2)
    assert engine._cache is cache
    for group, want in zip(again, WANTED[2][:2], strict=True):
        assert [r.text for r in group.rollouts] == [r.text for r in want.rollouts]
    sample(engine, copies=3)
    assert engine._cache is not cache


def test_nothing_to_do():
    assert sample(an_engine(), []) == []


def test_a_cache_is_as_large_as_of_use_and_as_its_memory():
    each = bytes_per_token(TEXT, torch.float32)
    assert each == 3 * 2 * 2 * 16 * 4
    limits = Limits(longest_prompt=50, max_new_tokens=10, max_rows=64, cache_bytes=1e9, prefill_tokens=1)

    def plan(prompts: int, copies: int, **changes: float):
        shape = plan_cache(TEXT, torch.float32, limits._replace(**changes), prompts=prompts, copies=copies)
        assert each * (shape.berths * 50 + shape.slots * 10) <= changes.get("cache_bytes", 1e9)
        return shape[:2]

    assert plan(4, 8) == (4, 32)
    assert plan(100, 8) == (16, 64)  # the next groups begin before the last rows of these have ended
    assert plan(100, 1) == (64, 64)
    assert plan(100, 8, max_rows=3) == (2, 3)
    assert plan(100, 8, cache_bytes=each * (100 + 30)) == (2, 3)
    assert plan(100, 8, cache_bytes=each * 110 + 1) == (2, 1)
    assert plan(1, 8, cache_bytes=each * 60) == (1, 1)
    with pytest.raises(
        ValueError, match=r"rollout.cache_gb: want at least 4.61e-05, .* 50 tokens .*_tokens 10, at 768"
    ):
        plan(1, 8, cache_bytes=each * 60 - 1)


def test_prompts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="record a: want a prompt of 14 tokens at most; got 15"):
        sample(an_engine(longest_prompt=14))
    with pytest.raises(
        ValueError, match=r"record a: .* 500 new tokens within the model's context of 512 tokens; .* 15"
    ):
        sample(an_engine(max_new_tokens=500))


def test_graphs_for_few_numbers_of_rows():
    buckets = {rows: module._bucket(rows, 100) for rows in range(1, 101)}
    assert all(rows <= bucket <= min(max(rows + 1, rows * 3 / 2), 100) for rows, bucket in buckets.items())
    assert len(set(buckets.values())) <= 18


def test_half_precision_samples():
    half = policy_of(VLM).to(DEVICE).requires_grad_(False)
    half.vlm.to(torch.bfloat16)
    groups = sample(an_engine(half, cache_bytes=1e9))
    assert all(r.logp.dtype == torch.float32 and r.logp.isfinite().all() for g in groups for r in g.rollouts)
    made = [made_group(g.prompt, [len(r.tokens) for r in g.rollouts]) for g in groups]
    assert [g.prompt for g in made] == PROMPTS
