"""The plan of a run as plain values, which `medground plan --json` prints: every key is always there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from medground.adamw import need_torchao
from medground.config import Config
from medground.lora import need_peft
from medground.plan.dry_run import DryRun, dry_run, with_precision
from medground.plan.efficiency import PHASES, Share, efficiencies
from medground.plan.fit import Room, Search, levers, room_of, scaled
from medground.plan.gpus import NODE, find_gpu, shards_of
from medground.plan.rehearsal import Job
from medground.plan.seconds import DEVIATION, Setting, Step, answer_tokens, step_on
from medground.plan.shapes import model_config
from medground.plan.workload import PromptSize, check_sizes, in_steps, largest_micro_batch, longest_prompt

COUNTS = tuple(2**i for i in range(11))
"""GPUs of the scaling tables."""


class Asked(NamedTuple):
    """What is asked of the planner beside the configuration.

    Attributes:
        gpu: name in `gpus.GPUS`.
        gpus: how many.
        text_tokens: of the longest prompt; None to measure or assume them.
        answer_tokens: mean of a completion; None to assume it.
    """

    gpu: str = "h100-80gb"
    gpus: int = 8
    text_tokens: int | None = None
    answer_tokens: float | None = None


def make_plan(config: Config, asked: Asked, tell: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Plan a run.

    Args:
        config: of the run.
        asked: where.
        tell: hears what is being done.

    Raises:
        ValueError: an option is not possible; names it.
    """
    gpu = find_gpu(asked.gpu)
    config = with_precision(in_steps(config), bool(gpu.name))
    if config.sharding.cpu_offload:
        raise ValueError("sharding.cpu_offload: want it off, since what lies on a CPU cannot be planned; got it on")
    if config.optimizer.kind == "adamw-8bit":
        need_torchao()
    model = model_config(config.model.path)
    prompt = longest_prompt(config, asked.text_tokens)
    check_sizes(config, prompt, asked.gpus, model.text_config.max_position_embeddings)
    shards_of(config.sharding.replicas, asked.gpus)
    if config.model.lora.rank:
        need_peft()
    job, room, answer = Job(prompt, model), room_of(gpu), answer_tokens(config, asked.answer_tokens)
    reached = efficiencies(gpu)
    search = Search(config, job, asked.gpus, room)
    found, _ = dry_run(job, config, asked.gpus, cuda=bool(gpu.name), tell=tell, tries=search)
    fits = room.fits(found.highest)
    lower = [] if fits else levers(job, config, asked.gpus, room, found, search, tell)
    setting = Setting(job, config, answer, found.facts, gpu, reached)
    tell("seconds")
    step = step_on(setting, asked.gpus, config.rollout.prompts_per_step)
    shares = {name: _share(reached.phases[name]) for name in PHASES}
    return {
        "gpu": {"kind": asked.gpu, "node": NODE, "product_rate": reached.rates.product, "rates": reached.told}
        | gpu._asdict(),
        "gpus": asked.gpus,
        "model": _model(config, found),
        "workload": _workload(config, prompt, asked.gpus, answer, found),
        "memory": _memory(found, room),
        "micro_batch": {
            "given": config.loss.micro_batch_tokens,
            "largest": search.best,
            "all_groups": search.whole,
            "needed_bytes": {str(tokens): room.needed(peak) for tokens, peak in sorted(search.peaks.items())},
        },
        "levers": [lever._asdict() for lever in lower],
        "time": _time(step, config, setting),
        "efficiencies": shares | {"link": _share(reached.link), "network": _share(reached.network)},
        "scaling": _scaling(setting, found, room, asked.gpus),
    }


def _share(share: Share) -> dict[str, Any]:
    return {"value": share.value, "source": "measured" if share.measured else "assumed", "why": share.why}


def _model(config: Config, found: DryRun) -> dict[str, Any]:
    facts = found.facts
    return {
        "path": config.model.path,
        "parameters": facts.gathered // facts.model.itemsize,
        "trained": facts.model.parameters,
        "precision": config.model.precision,
        "activation_checkpointing": config.model.activation_checkpointing,
        "lora_rank": config.model.lora.rank,
        "reference": bool(config.loss.beta),
    }


def _workload(config: Config, prompt: PromptSize, gpus: int, answer: float, found: DryRun) -> dict[str, Any]:
    batch, r = largest_micro_batch(config, prompt, gpus), config.rollout
    return {
        "prompt_tokens": prompt.tokens,
        "text_tokens": prompt.text,
        "image_tokens": prompt.tokens - prompt.text,
        "prompt_source": prompt.told,
        "prompts_per_step": r.prompts_per_step,
        "group_size": r.group_size,
        "max_new_tokens": r.max_new_tokens,
        "mean_answer_tokens": answer,
        "answer_deviation": DEVIATION,
        "micro_batch_tokens": batch.tokens,
        "micro_batch_groups": len(batch.lengths),
        "micro_batches": found.micro_batches,
    }


def _memory(found: DryRun, room: Room) -> dict[str, Any]:
    highest = max(found.peaks, key=lambda name: found.peaks[name].total)
    live = found.highest.total
    return {
        "phases": {
            name: {
                "live_bytes": peak.total,
                "needed_bytes": room.needed(peak),
                "parts": dict(sorted(peak.parts.items())),
            }
            for name, peak in found.peaks.items()
        },
        "highest": highest,
        "live_bytes": live,
        "slack_bytes": live * room.slack,
        "context_bytes": room.context,
        "needed_bytes": room.needed(live),
        "room_bytes": room.memory,
        "free_bytes": room.memory - room.needed(live),
        "fits": room.fits(live),
    }


def _time(step: Step, config: Config, setting: Setting) -> dict[str, Any]:
    return {
        "phases": {
            name: {"seconds": phase.seconds, "communication_seconds": phase.communication, "bound": phase.bound}
            for name, phase in step.phases.items()
        },
        "steps": config.steps,
        "mfu": step.operations / step.seconds / setting.reached.rates.product / step.gpus,
    } | _figures(step, config)


def _figures(step: Step, config: Config) -> dict[str, Any]:
    hours = step.seconds * config.steps / 3600
    return {
        "gpus": step.gpus,
        "prompts": step.prompts,
        "step_seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "communication": step.communication,
        "hours": hours,
        "gpu_hours": hours * step.gpus,
    }


def _scaling(setting: Setting, found: DryRun, room: Room, gpus: int) -> dict[str, list[dict[str, Any]]]:
    """Weak: as many prompts a GPU as planned. Strong: the prompts of a step, on as many GPUs as divide them."""
    config = setting.config
    B = config.rollout.prompts_per_step
    weak = [step_on(setting, n, n * B // gpus) for n in COUNTS]
    strong = [step_on(setting, n, B) for n in COUNTS if B % n == 0]
    rows = {}
    for name, steps in (("weak", weak), ("strong", strong)):
        first = steps[0].tokens_per_second / steps[0].gpus
        rows[name] = [
            _figures(step, config) | {"efficiency": step.tokens_per_second / step.gpus / first} for step in steps
        ]
    for row in rows["weak"]:
        shards, others = (shards_of(config.sharding.replicas, n) for n in (gpus, row["gpus"]))
        needed = room.needed(scaled(found.peaks, shards, others))
        row |= {"needed_bytes": needed, "fits": needed <= room.memory}
    return rows
