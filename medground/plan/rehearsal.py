"""A step of training on made-up groups, phase by phase, by the very functions that train.

Run on ranks that are not there (`dry_run`) it shows what memory a configuration takes; run truly, by `bench.planned`,
what it took. All that the planner knows of `train`, `sharding`, `policy` and `rollout` is in this file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast
from unittest.mock import patch

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from medground import build, train
from medground import policy as policy_module
from medground.config import Config
from medground.costs import Network, network_of
from medground.packing import pack_prompts
from medground.plan.floors import Model, model_of
from medground.plan.tracker import Tracker
from medground.plan.workload import PromptSize, largest_micro_batch, made_groups, made_prompts
from medground.policy import Policy
from medground.records import Prompt
from medground.rollout.cache import Cache, Sampling, Shape
from medground.rollout.decoder import Decoder
from medground.rollout.engine import Limits, plan_cache
from medground.sharding import Ranks, WholeCopy
from medground.step_metrics import Clock, Totals

BESIDE = "moments"
"""What is no phase of a run, but has to be watched."""
_MANY = 1 << 20  # records of an evaluation: enough to fill its cache


class Meter(Protocol):
    """What watches the memory."""

    def begin(self, phase: str) -> None:
        """End the phase before and begin another."""

    def end(self) -> None:
        """End the phase."""

    def label(self, name: str) -> AbstractContextManager[None]:
        """What is allocated meanwhile is for this."""


class Job(NamedTuple):
    """The longest prompt, and the configuration of the model."""

    prompt: PromptSize
    model: Qwen2_5_VLConfig


class Facts(NamedTuple):
    """What seconds depend on.

    Attributes:
        network: what decides the operations.
        model: what else the floors need, for one rank alone.
        units: of FSDP2.
        gathered: bytes of all weights in the dtype in which they are gathered.
        gathered_again: of those that a backward pass gathers, the root unit and a frozen vision tower left out.
        reduced: bytes of all gradients, float32.
    """

    network: Network
    model: Model
    units: int
    gathered: int
    gathered_again: int
    reduced: int


class Rehearsal:
    """What a rank holds, and the phases of its step; each is begun and ended with the meter.

    Attributes:
        policy: sharded.
    """

    def __init__(self, job: Job, config: Config, folder: Path, ranks: Ranks, meter: Meter):
        """Load everything, and take AdamW's first step, from which on its moments are there.

        Args:
            job: what the step has to do.
            config: of the run; its precision is not auto.
            folder: of the model.
            ranks: this one among the others.
            meter: watches.
        """
        ranks = ranks.arranged(config.sharding.replicas)
        self._job, self._config, self._ranks, self._meter = job, config, ranks, meter
        precision = config.model.precision
        meter.begin("load")
        with meter.label("weights"):
            self.policy = build.build_policy(folder, config, ranks)
        with meter.label("reference"):
            self._reference = build.build_reference(self.policy, folder, config, ranks)
        with meter.label("rollout_weights"):
            self._whole = WholeCopy(self.policy, ranks, precision)
            self._decoder = Decoder(self._whole.policy)
        meter.begin(BESIDE)  # a run has its moments from its first step on
        self._cache: Cache | None = None
        with meter.label("optimizer"):
            self._optimizer = build.build_optimizer(self.policy, config)
            for weight in self._trained():
                weight.grad = torch.zeros_like(weight)
            self._optimizer.step()
            self._optimizer.zero_grad()
        meter.end()

    def _trained(self) -> list[torch.nn.Parameter]:
        return [weight for weight in self.policy.parameters() if weight.requires_grad]

    @property
    def facts(self) -> Facts:
        """What seconds depend on."""
        text, visual = self.policy.vlm.model.language_model, self.policy.vlm.model.visual
        weights = self._whole.policy.vlm.lm_head.weight
        network = network_of(self.policy)
        again = sum(weight.numel() for weight in text.layers.parameters())
        again += network.vision_trained * sum(weight.numel() for weight in visual.blocks.parameters())
        return Facts(
            network=network,
            model=model_of(self.policy, weights.itemsize, network),
            units=len(text.layers) + len(visual.blocks) + 1,
            gathered=weights.itemsize * sum(weight.numel() for weight in self.policy.parameters()),
            gathered_again=weights.itemsize * again,
            reduced=4 * sum(weight.numel() for weight in self._trained()),
        )

    def evaluate(self) -> None:
        """Draw with a cache as full as `rollout.cache_gb` lets it be."""
        self._sample("evaluation", _MANY, 1)

    def roll_out(self) -> None:
        """Draw as a step does."""
        r = self._config.rollout
        self._sample("rollout", r.prompts_per_step // self._ranks.size, r.group_size)

    def _sample(self, phase: str, count: int, copies: int) -> None:
        """Refresh the weights, run as many of `count` prompts as are run at once, and draw two tokens of each row."""
        meter, policy, prompt = self._meter, self._whole.policy, self._job.prompt
        meter.begin(phase)
        with meter.label("rollout"):
            self._whole.refresh()
        shape = cache_shape(self._job, self._config, policy.vlm.lm_head.weight.dtype, count, copies)
        self._cache = None  # frees its memory first
        with torch.inference_mode():
            with meter.label("cache"):
                self._cache = Cache(policy, self._decoder, shape, [0])
            with meter.label("rollout"):
                at_once = min(max(self._config.rollout.prefill_tokens // prompt.tokens, 1), shape.berths)
                self._draw(self._cache, made_prompts(prompt, self._job.model, at_once), copies)
        meter.end()

    def _draw(self, cache: Cache, prompts: Sequence[Prompt], copies: int) -> None:
        policy, r = self._whole.policy, self._config.rollout
        packed = pack_prompts(prompts, policy.vlm.config, policy.device)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        starts = [int(prompt.position_ids.max()) + 1 for prompt in prompts]
        cache.prefill(packed, list(range(len(prompts))), lengths, starts)
        del packed
        berths = [slot // copies for slot in range(min(cache.shape.slots, len(prompts) * copies))]
        sampling = Sampling(r.temperature, r.top_k, r.top_p)
        cache.start(list(range(len(berths))), berths, berths, sampling)
        cache.seat(berths)
        cache.step(len(berths), len(prompts), sampling)

    def update(self, micro_batch_tokens: int | None = None) -> int:
        """Score and train on the largest micro-batch that there may be: how many of them.

        Args:
            micro_batch_tokens: in place of config.loss's.
        """
        config, meter, ranks = self._config, self._meter, self._ranks
        if micro_batch_tokens:
            config = replace(config, loss=replace(config.loss, micro_batch_tokens=micro_batch_tokens))
        batch = largest_micro_batch(config, self._job.prompt, ranks.size)
        meter.begin("score")
        with meter.label("batch"):
            prompts = made_prompts(self._job.prompt, self._job.model, len(batch.lengths))
            groups = made_groups(prompts, batch.lengths)
            advantages = torch.ones(len(groups), config.rollout.group_size)
            micro = [
                made
                for _ in range(batch.number)
                for made in train._micro_batches(self.policy, groups, advantages, config, ranks)
            ]
        assert len(micro) == batch.number, (len(micro), batch)
        with meter.label("score"):
            train._score(self.policy, self._reference, micro, config)
        sequences = batch.number * ranks.size * len(groups) * config.rollout.group_size
        totals = Totals(batch.number * ranks.size * sum(map(sum, batch.lengths)), sequences, {})
        meter.begin("update")
        with meter.label("backward"):
            train._update(self.policy, self._optimizer, micro, totals, config, ranks, 0, cast(Clock, _Laps(meter)))
        meter.end()
        return batch.number


def cache_shape(job: Job, config: Config, dtype: torch.dtype, prompts: int, copies: int) -> Shape:
    """Of the cache that so many prompts of a rank are decoded with.

    Raises:
        ValueError: `rollout.cache_gb` does not suffice for one row.
    """
    r = config.rollout
    limits = Limits(job.prompt.tokens, r.max_new_tokens, r.max_rows, r.cache_gb * 1e9, r.prefill_tokens)
    return plan_cache(job.model.text_config, dtype, limits, prompts=prompts, copies=copies)


class _Laps:
    """Hears of the end of an update's phases, as a step's clock does."""

    def __init__(self, meter: Meter):
        self._meter = meter

    def lap(self, phase: str) -> None:
        self._meter.begin("optimizer" if phase == "update" else "update")


@contextmanager
def nothing_there(model: Qwen2_5_VLConfig, tracker: Tracker) -> Iterator[None]:
    """Let a rehearsal load no weights, read no result and say what it allocates for."""

    def empty_policy(folder: Path, dtype: torch.dtype) -> Policy:
        with torch.device("meta"):
            vlm = Qwen2_5_VLForConditionalGeneration(copy.deepcopy(model))
        policy = Policy(vlm.to(dtype))
        for name, buffer in list(policy.named_buffers()):  # which are not on "meta" in truth
            policy.set_tensor(name, torch.empty_like(buffer, device="meta"))
        return policy

    changes: list[tuple[Any, str, Callable]] = [
        (build, "empty_policy", empty_policy),
        (build, "check_weights", lambda model, folder: {}),
        (build, "read_weights", lambda *args: None),
        (build, "draw_adapters", lambda *args: None),
        (train, "update_statistics", lambda *args: {}),
        (Cache, "_replay", lambda cache, rows, sampling: cache._step(rows, cache.shape.berths, sampling)),
        (Policy, "_scored", tracker.labelled("activations", Policy._scored)),
        (policy_module, "linear_grpo", tracker.labelled("head", policy_module.linear_grpo)),
        (policy_module, "linear_logprob", tracker.labelled("head", policy_module.linear_logprob)),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield
