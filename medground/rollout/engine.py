"""Prompts -> completions: each prompt runs once, then its G rows decode over one copy of its keys and values.

Rows that end leave and waiting ones take their places, so the batch stays full until the work is done. Every row's
random numbers depend on (run seed, step, record id, completion index) alone: the same completions come out whatever the
batch, the slots or the number of ranks, as far as float sums do. Of the model's own generation_config only the stop
tokens are used: tokens come from exactly the distribution asked for, but that image and video tokens are never drawn.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from medground.packing import pack_prompts
from medground.records import Group, Prompt, Rollout
from medground.rollout.cache import Cache, Sampling, Shape, bytes_per_token
from medground.rollout.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLTextConfig

    from medground.policy import Policy


class Lengths(Protocol):
    """How long a completion may be."""

    def __call__(self, prompt: Prompt, index: int) -> int:
        """Tokens, 1 or more, of a prompt's completion."""


class Limits(NamedTuple):
    """What decoding may take.

    Attributes:
        longest_prompt: tokens of the longest prompt that will come.
        max_new_tokens: longest completion, in tokens.
        max_rows: most rows decoded at once.
        cache_bytes: memory for keys and values.
        prefill_tokens: most prompt tokens run at once (one prompt at least).
    """

    longest_prompt: int
    max_new_tokens: int
    max_rows: int
    cache_bytes: float
    prefill_tokens: int


def plan_cache(config: Qwen2_5_VLTextConfig, dtype: torch.dtype, limits: Limits, *, prompts: int, copies: int) -> Shape:
    """The largest cache that is of use and fits its memory.

    Raises:
        ValueError: not even one row does.
    """
    each = bytes_per_token(config, dtype)
    P, C = limits.longest_prompt, limits.max_new_tokens
    for slots in range(min(prompts * copies, limits.max_rows), 0, -1):
        groups = -(-slots // copies)
        # the last rows of a group hold its berth while the next group's begin
        berths = min(prompts, groups if copies == 1 else 2 * groups)
        if each * (berths * P + slots * C) <= limits.cache_bytes:
            return Shape(berths, slots, copies, P, C)
    raise ValueError(
        f"rollout.cache_gb: want at least {each * (P + C) / 1e9:.3g}, for a prompt of {P} tokens and "
        f"rollout.max_new_tokens {C}, at {each} bytes a token; got {limits.cache_bytes / 1e9:.3g}"
    )


@dataclass
class RolloutStats:
    """What a roll-out did.

    Attributes:
        prefill_seconds: running prompts.
        decode_seconds: all else.
        prompt_tokens: tokens of prompts, each prompt once.
        new_tokens: tokens of completions.
        steps: decoding steps.
        slots: rows of all steps, idle ones included.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    slots: int = 0

    def and_of(self, more: RolloutStats) -> RolloutStats:
        """Of this roll-out and one after it."""
        return RolloutStats(*map(sum, zip(astuple(self), astuple(more), strict=True)))


class Engine:
    """Samples completions from a policy whose weights are whole; keeps its cache from one call to the next."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, limits: Limits):
        self.policy, self.limits = policy, limits
        self._tokenizer = tokenizer
        self._stop = _stop_tokens(policy, tokenizer)
        self._decoder = Decoder(policy)
        self._cache: Cache | None = None
        self.stats = RolloutStats()

    @torch.inference_mode()  # which a generator leaves whenever it yields
    def roll_out(
        self,
        prompts: Iterable[Prompt],
        *,
        count: int,
        copies: int,
        sampling: Sampling,
        seed: int = 0,
        step: int = 0,
        bar: tqdm | None = None,
        lengths: Lengths | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, Group]]:
        """Sample completions; `stats` tells of the last call.

        Args:
            prompts: `count` of them, taken as there is room for them.
            count: how many.
            copies: completions of each (G).
            sampling: temperature 0 is greedy.
            seed: of the run.
            step: of the run; another step draws other completions.
            bar: moves on by one for each completion.
            lengths: cut each completion at its own limit, within the engine's; for benchmarks.
            stop: asked before each decoding step; True ends the roll-out, and groups that are not complete are lost.

        Yields:
            (number of the prompt, its group), as groups are complete.

        Raises:
            ValueError: a prompt is longer than the limits or, with a completion, than the model's context; the cache's
                memory does not suffice for one row. Names the record.
        """
        self.stats = RolloutStats()
        if count:
            cache = self._cache_for(count, copies)
            run = _Run(self, cache, prompts, copies, sampling, f"{seed}/{step}", bar, lengths)
            yield from run.groups(stop or (lambda: False))

    def _cache_for(self, prompts: int, copies: int) -> Cache:
        weight = self.policy.vlm.lm_head.weight
        shape = plan_cache(
            self.policy.vlm.config.text_config, weight.dtype, self.limits, prompts=prompts, copies=copies
        )
        old = self._cache.shape if self._cache else None
        if not old or old.copies != copies or old.slots < shape.slots or old.berths < shape.berths:
            self._cache = None  # frees its memory first
            self._cache = Cache(self.policy, self._decoder, shape, self._stop)
        assert self._cache
        return self._cache

    def check(self, prompt: Prompt) -> None:
        """See that a prompt and its completion fit."""
        length, C, name = len(prompt.input_ids), self.limits.max_new_tokens, prompt.example.id
        context = self.policy.vlm.config.text_config.max_position_embeddings
        if length + C > context:
            raise ValueError(
                f"record {name}: want a prompt and {C} new tokens within the model's context of {context} tokens; "
                f"got a prompt of {length}"
            )
        if length > self.limits.longest_prompt:
            raise ValueError(
                f"record {name}: want a prompt of {self.limits.longest_prompt} tokens at most; got {length}"
            )

    def text(self, tokens: Tensor) -> str:
        """A completion in words."""
        return self._tokenizer.decode(tokens)


class _Open:
    """A group that is being sampled."""

    def __init__(self, number: int, prompt: Prompt, copies: int, berth: int):
        self.number, self.prompt, self.berth = number, prompt, berth
        self.waiting = deque(range(copies))
        self.rollouts: list[Rollout | None] = [None] * copies

    @property
    def is_complete(self) -> bool:
        """Whether every completion has ended."""
        return all(rollout is not None for rollout in self.rollouts)


class _Row:
    """A completion that is being sampled, in the slot of its place in the list of rows."""

    def __init__(self, group: _Open, index: int, limit: int):
        self.group, self.index, self.limit = group, index, limit
        self.drawn = 1
        self.running = True


class _Run:
    """One call of `Engine.roll_out`."""

    def __init__(self, engine: Engine, cache: Cache, prompts, copies, sampling: Sampling, stream: str, bar, lengths):
        self.engine, self.cache, self.copies, self.sampling, self.stream = engine, cache, copies, sampling, stream
        self.coming = enumerate(prompts)
        self.next = next(self.coming, None)
        self.open: list[_Open] = []  # one for each berth from 0 on
        self.rows: list[_Row] = []  # one for each slot from 0 on
        self.complete: list[_Open] = []
        self.stats, self.bar, self.lengths = engine.stats, bar, lengths
        self.cuda = engine.policy.device.type == "cuda"
        # one step is under way on a GPU while the host looks at the one before
        self.ahead = 1 if self.cuda else 0

    def groups(self, stop: Callable[[], bool]) -> Iterator[tuple[int, Group]]:
        under_way: deque[tuple[list[tuple[_Row, int]], Tensor, torch.cuda.Event | None]] = deque()
        start, away = self._now(), 0.0
        self._fill()
        while (self.rows or under_way or self.complete) and not stop():
            if self.rows:
                under_way.append(self._step())
            if len(under_way) > self.ahead or (under_way and not self.rows):
                self._end_rows(*under_way.popleft())
            complete, self.complete = self.complete, []
            left = time.perf_counter()
            for group in complete:
                yield group.number, Group(group.prompt, tuple(r for r in group.rollouts if r is not None))
            away += time.perf_counter() - left
        self.stats.decode_seconds = self._now() - start - away - self.stats.prefill_seconds

    def _step(self) -> tuple[list[tuple[_Row, int]], Tensor, torch.cuda.Event | None]:
        """Launch a step: its rows with the tokens they will have, and who has stopped, known once the event is."""
        R = len(self.rows)
        slots = _bucket(R, self.cache.shape.slots) if self.cuda else R
        stopped = self.cache.step(slots, len(self.open), self.sampling)
        for row in self.rows:
            row.drawn += 1
        self.stats.steps += 1
        self.stats.slots += slots
        event = None
        if self.cuda:
            stopped = torch.empty(slots, dtype=torch.bool, pin_memory=True).copy_(stopped, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return [(row, row.drawn) for row in self.rows], stopped, event

    def _end_rows(self, rows: list[tuple[_Row, int]], stopped: Tensor, event: torch.cuda.Event | None) -> None:
        """Let rows go that have stopped or reached the limit, and fill their slots."""
        if event:
            event.synchronize()
        flags = stopped.tolist()
        ended = [
            (row, drawn, flag)
            for (row, drawn), flag in zip(rows, flags, strict=False)
            if row.running and (flag or drawn == row.limit)
        ]
        if ended:
            self._leave(ended)
            self._fill()

    def _leave(self, ended: list[tuple[_Row, int, bool]]) -> None:
        slot_of = {row: slot for slot, row in enumerate(self.rows)}
        tokens, logps = self.cache.completions([slot_of[row] for row, _, _ in ended])
        for at, (row, length, stopped) in enumerate(ended):
            row.running = False
            row.group.rollouts[row.index] = Rollout(
                tokens=tokens[at, :length].clone(),
                logp=logps[at, :length].clone(),
                # a special token within the completion is part of what was said; the one that ends it is not
                text=self.engine.text(tokens[at, : length - stopped]),
                finished=stopped,
            )
            self.stats.new_tokens += length
            if self.bar is not None:
                self.bar.update()
        self.complete += [group for group in dict.fromkeys(row.group for row, _, _ in ended) if group.is_complete]

    def _fill(self) -> None:
        """Give free slots to waiting completions, and close the gaps that stay."""
        ended = True
        while ended:  # a completion may end with its first token
            self._close_berths()
            free = [slot for slot, row in enumerate(self.rows) if not row.running]
            free += range(len(self.rows), self.cache.shape.slots)
            self._prefill(len(free))
            ended = self._start(free)
        self._close_gaps()
        self.cache.seat([row.group.berth for row in self.rows])

    def _prefill(self, free: int) -> None:
        """Run prompts until there is a completion for every free slot, or no berth, or no prompt left."""
        waiting = sum(len(group.waiting) for group in self.open)
        while self.next and waiting < free and len(self.open) < self.cache.shape.berths:
            batch: list[_Open] = []
            tokens = 0
            while self.next and waiting < free and len(self.open) + len(batch) < self.cache.shape.berths:
                number, prompt = self.next
                self.engine.check(prompt)
                tokens += len(prompt.input_ids)
                if batch and tokens > self.engine.limits.prefill_tokens:
                    break
                batch.append(_Open(number, prompt, self.copies, len(self.open) + len(batch)))
                waiting += self.copies
                self.next = next(self.coming, None)
            self._run_prompts(batch)

    def _run_prompts(self, batch: list[_Open]) -> None:
        start, policy = self._now(), self.engine.policy
        prompts = [group.prompt for group in batch]
        with record_function("prefill"):
            self.cache.prefill(
                pack_prompts(prompts, policy.vlm.config, policy.device),
                [group.berth for group in batch],
                [len(prompt.input_ids) for prompt in prompts],
                [int(prompt.position_ids.max()) + 1 for prompt in prompts],
            )
        self.open += batch
        self.stats.prompt_tokens += sum(len(prompt.input_ids) for prompt in prompts)
        self.stats.prefill_seconds += self._now() - start

    def _start(self, free: list[int]) -> bool:
        """Draw the first token of as many completions as there are free slots; whether one of them has ended by it."""
        new: list[_Row] = []
        for group in self.open:
            while group.waiting and len(new) < len(free):
                index = group.waiting.popleft()
                new.append(_Row(group, index, self._limit(group.prompt, index)))
        if not new:
            return False
        slots, berths = free[: len(new)], [row.group.berth for row in new]
        seeds = [_stream(f"{self.stream}/{row.group.prompt.example.id}/{row.index}") for row in new]
        stopped = self.cache.start(slots, berths, seeds, self.sampling).tolist()
        for slot, row in zip(slots, new, strict=True):
            self.rows[slot : slot + 1] = [row]
        ended = [(row, 1, flag) for row, flag in zip(new, stopped, strict=True) if flag or row.limit == 1]
        if ended:
            self._leave(ended)
        return bool(ended)

    def _limit(self, prompt: Prompt, index: int) -> int:
        most = self.engine.limits.max_new_tokens
        return min(most, self.lengths(prompt, index)) if self.lengths else most

    def _close_gaps(self) -> None:
        """Move the last rows into slots that nobody took."""
        R = sum(row.running for row in self.rows)
        gaps = [slot for slot in range(R) if not self.rows[slot].running]
        last = [slot for slot in range(R, len(self.rows)) if self.rows[slot].running]
        if gaps:
            self.cache.move_rows(last, gaps)
            for slot, gap in zip(last, gaps, strict=True):
                self.rows[gap] = self.rows[slot]
        del self.rows[R:]

    def _close_berths(self) -> None:
        """Free the berths of complete groups and move the last groups into them."""
        for berth in range(len(self.open) - 1, -1, -1):
            if self.open[berth].is_complete:
                last = self.open.pop()
                if berth < len(self.open):
                    self.cache.move_berth(last.berth, berth)
                    last.berth, self.open[berth] = berth, last

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _bucket(rows: int, slots: int) -> int:
    """Rows of the CUDA graph that steps `rows` of them: few different ones, seldom much larger."""
    grain = 1 << max(rows.bit_length() - 2, 0)
    return min(-(-rows // grain) * grain, slots)


def _stop_tokens(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    model = (policy.vlm.config.text_config.eos_token_id, policy.vlm.generation_config.eos_token_id)
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, *model):
        found |= set(ids) if isinstance(ids, list) else {ids} - {None}
    return sorted(found)


def _stream(name: str) -> int:
    # 63 bits: the key of a Philox stream, as a non-negative int64
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
