"""Seconds of a step on so many GPUs: floors over the shares that are reached, and what communication adds.

Answers have a log-normal length, as those of `bench.step_workloads`; the slowest rank decides how long decoding takes.
Weights of the next unit are gathered while one computes: of the collectives of scoring and update only what takes
longer than the computation shows, and one unit of each pass. Nothing computes while the weights that decode are
refreshed.

    collective   bytes * (n - 1) / n / bandwidth + calls * latency,   bytes of the whole tensors
    bandwidth    of the link where all ranks are in one node; else of the link or of all 8 network cards of a node,
                 whichever is less, since rings go through all of them

Not counted: images that are read too slowly, rewards, evaluation, checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from medground.config import Config
from medground.costs import Sizes, step_operations
from medground.micro_batches import Load, deal
from medground.plan.efficiency import PHASES, Efficiencies
from medground.plan.floors import decode_bytes, decoding, floors
from medground.plan.gpus import NODE, Gpu, shards_of
from medground.plan.rehearsal import Facts, Job, cache_shape

ANSWER_TOKENS = 100
"""Assumed mean: a line of reasoning and a box in JSON (a public log of VLM-R1 has about as many)."""
DEVIATION = 0.4  # of the logarithm of a length
NODE_LATENCY, RING_LATENCY = 20e-6, 5e-6
"""Assumed seconds of a collective within a node, and for each further node that its ring goes through."""


class Phase(NamedTuple):
    """Seconds of a phase, those of them in which it only communicates, and what decides: products, memory, network."""

    seconds: float
    communication: float
    bound: str


@dataclass(frozen=True)
class Setting:
    """What does not depend on the number of GPUs.

    Attributes:
        job: all prompts are like its longest.
        config: of the run.
        answer: mean tokens of a completion.
        facts: from the dry run.
        gpu: of the nodes.
        reached: of its rates.
    """

    job: Job
    config: Config
    answer: float
    facts: Facts
    gpu: Gpu
    reached: Efficiencies


@dataclass(frozen=True)
class Step:
    """A step on n GPUs.

    Attributes:
        gpus: n.
        prompts: of all ranks.
        phases: by name.
        tokens: completion tokens of all ranks.
        operations: of all ranks, as `costs` counts them.
    """

    gpus: int
    prompts: int
    phases: dict[str, Phase]
    tokens: int
    operations: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def communication(self) -> float:
        """Share of the step in which a GPU only communicates."""
        return sum(phase.communication for phase in self.phases.values()) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens, of all ranks."""
        return self.tokens / self.seconds


def answer_tokens(config: Config, asked: float | None) -> float:
    """Mean tokens of a completion: as asked, or else assumed.

    Raises:
        ValueError: completions cannot be as long.
    """
    most = config.rollout.max_new_tokens
    if asked is None:
        return min(ANSWER_TOKENS, max(most / 2, 1))
    if not 1 <= asked <= most:
        raise ValueError(f"--answer-tokens: want 1 to rollout.max_new_tokens, {most}; got {asked}")
    return asked


def step_on(setting: Setting, gpus: int, prompts: int) -> Step:
    """A step of so many prompts, a multiple of the GPUs."""
    config, facts, reached = setting.config, setting.facts, setting.reached
    ranks = _answers(setting, gpus, prompts // gpus)
    every = [group for groups in ranks for group in groups]
    dtype = {2: torch.bfloat16, 4: torch.float32}[facts.model.itemsize]
    slots = cache_shape(setting.job, config, dtype, prompts // gpus, config.rollout.group_size).slots
    # `deal` evens the work of scoring and update out, but each rank decodes its own answers
    slowest = max(ranks, key=lambda groups: decoding(groups, slots).steps)
    counted = step_operations(facts.network, every, scorings=scorings(config), epochs=config.loss.inner_epochs)
    needed = {phase: operations / gpus for phase, operations in counted.items()}
    needed["update"] += recomputed(setting, every) / gpus
    shards = shards_of(config.sharding.replicas, gpus)
    model = facts.model._replace(parameters=-(-facts.model.parameters // shards))
    least = floors(model, slowest, needed, reached.rates, slots)
    micro = _micro_batches(setting, ranks[0])
    phases = {}
    for phase in PHASES:
        computing = least[phase] / reached.phases[phase].value
        waiting = _communication(setting, phase, micro, gpus, computing)
        bound = "products" if phase in ("prefill", "score", "update") else "memory"
        if (
            phase == "decode"
            and needed[phase] / reached.rates.product > decode_bytes(model, slowest, slots) / reached.rates.copy
        ):
            bound = "products"
        phases[phase] = Phase(computing + waiting, waiting, "network" if waiting > computing else bound)
    tokens = sum(sum(group.completions) for group in every)
    return Step(gpus, prompts, phases, tokens, sum(counted.values()))


def scorings(config: Config) -> int:
    """Forward passes for log-probabilities of the old and the reference policy."""
    old = config.rollout.old_logp == "rescored" and config.loss.inner_epochs > 1
    return int(old) + int(config.loss.beta > 0)


def recomputed(setting: Setting, groups: list[Sizes]) -> float:
    """Operations of the layers' second forward pass under full activation checkpointing."""
    config, network = setting.config, setting.facts.network
    if config.model.activation_checkpointing != "full":
        return 0.0  # selective: no product is computed again
    forward = step_operations(network, groups, scorings=1)["score"]
    head = 2.0 * network.head_weights * sum(sum(group.completions) for group in groups)
    return config.loss.inner_epochs * (forward - head)


def collective_seconds(gpu: Gpu, reached: Efficiencies, whole: float, calls: float, gpus: int) -> float:
    """Of collectives that give out so many bytes of whole tensors."""
    if gpus == 1:
        return 0.0
    bandwidth, latency = gpu.link * reached.link.value, NODE_LATENCY
    if gpus > NODE:
        bandwidth = min(bandwidth, NODE * gpu.network * reached.network.value)
        latency += RING_LATENCY * (-(-gpus // NODE) - 1)
    return whole * (gpus - 1) / gpus / bandwidth + calls * latency


def _communication(setting: Setting, phase: str, micro: int, gpus: int, computing: float) -> float:
    """Seconds in which a phase only communicates."""
    facts, config = setting.facts, setting.config

    shards = shards_of(config.sharding.replicas, gpus)

    def seconds(whole: float, calls: float) -> float:
        return collective_seconds(setting.gpu, setting.reached, whole, calls, shards)

    gather = seconds(facts.gathered, facts.units)
    if phase == "decode":  # the refresh
        return gather
    if phase == "score":
        passes = micro * scorings(config)
        return max(passes * gather - computing, passes * gather / facts.units)
    if phase == "update":
        again, reduce = seconds(facts.gathered_again, facts.units - 1), seconds(facts.reduced, facts.units)
        epochs = config.loss.inner_epochs
        passes = micro * epochs
        sums = passes if config.sharding.reduce == "each" else epochs
        whole = passes * (gather + again) + sums * reduce + epochs * _across(setting, gpus // shards, shards)
        return max(whole - computing, passes * gather / facts.units)
    return 0.0


def _across(setting: Setting, replicas: int, shards: int) -> float:
    """Seconds of summing each GPU's shard of the gradients across replicas, which lie on other nodes."""
    if replicas == 1:
        return 0.0
    facts, bandwidth = setting.facts, setting.gpu.network * setting.reached.network.value
    calls = facts.units * (NODE_LATENCY + RING_LATENCY * (replicas - 1))
    return 2 * facts.reduced / shards * (replicas - 1) / replicas / bandwidth + calls


def _answers(setting: Setting, ranks: int, prompts: int) -> list[list[Sizes]]:
    """Groups of each rank; all answers together have every quantile of their lengths once, dealt out at random."""
    r, mean = setting.config.rollout, setting.answer
    rows = ranks * prompts * r.group_size
    quantiles = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    lengths = mean * (DEVIATION * torch.special.ndtri(quantiles) - DEVIATION**2 / 2).exp()
    whole = lengths.round().long().clamp(1, r.max_new_tokens)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    drawn = whole[order].view(ranks, prompts, r.group_size).tolist()
    grid = [[1, *setting.job.prompt.grid]]
    return [[Sizes(setting.job.prompt.tokens, grid, answers) for answers in rank] for rank in drawn]


def _micro_batches(setting: Setting, groups: list[Sizes]) -> int:
    """How many a rank with these groups has."""
    tokens = [group.prompt + sum(group.completions) for group in groups]
    return len(deal([[Load(n, n) for n in tokens]], setting.config.loss.micro_batch_tokens)[0])
