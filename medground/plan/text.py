"""The plan in words and tables, from the values of `planner`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PARTS = {
    "weights": "weights, this GPU's shard",
    "reference": "reference policy, shard",
    "optimizer": "moments, shard",
    "gradients": "gradients, shard",
    "whole_gradients": "gradients of whole weights",
    "gathered": "whole weights of units that compute",
    "rollout_weights": "whole copy that decodes",
    "cache": "keys and values",
    "activations": "forward pass",
    "backward": "backward pass",
    "head": "logits, gradients of the head",
}
"""Parts of memory by name in the plan; all others are one."""


def render(plan: dict[str, Any]) -> str:
    """All of it."""
    parts = [_title(plan), _memory(plan), _verdict(plan), _time(plan), _scaling(plan), _sources(plan)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines: the first column to the left, all others to the right."""
    lines = [list(head), *map(list, rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, width, strict=True))
        )
        for line in (lines[0], ["-" * w for w in width], *lines[1:])
    ]


def gb(size: float) -> str:
    """10^9 bytes."""
    return f"{size / 1e9:.1f}"


def _title(plan: dict[str, Any]) -> str:
    model, work, gpu = plan["model"], plan["workload"], plan["gpu"]
    what = f"adapters of rank {model['lora_rank']}" if model["lora_rank"] else "all weights"
    trained = f"{model['trained'] / 1e9:.2f} of {model['parameters'] / 1e9:.2f} billion trained ({what})"
    extras = [model["precision"]]
    recomputed = model["activation_checkpointing"]
    extras += [f"{recomputed} activation checkpointing"] * (recomputed != "none")
    extras += ["a reference policy"] * model["reference"]
    return "\n".join(
        [
            f"{model['path']}: {trained}; {', '.join(extras)}",
            f"{plan['gpus']} x {gpu['kind']}: {gb(gpu['memory'])} GB, {gpu['bandwidth'] / 1e12:.2f} TB/s, "
            f"{gpu['product_rate'] / 1e12:.4g} TF/s ({gpu['rates']}); {gpu['wires']}",
            f"a step: {work['prompts_per_step']} prompts of {work['prompt_tokens']} tokens ({work['image_tokens']} the "
            f"image's, {work['text_tokens']} of text: {work['prompt_source']}), {work['group_size']} completions each",
        ]
    )


def _memory(plan: dict[str, Any]) -> str:
    memory, work = plan["memory"], plan["workload"]
    phases = list(memory["phases"].values())
    rows = [[told, *(_cell(row["parts"].get(part, 0)) for row in phases)] for part, told in PARTS.items()]
    others = [sum(size for part, size in row["parts"].items() if part not in PARTS) for row in phases]
    rows = [row for row in [*rows, ["other", *map(_cell, others)]] if any(row[1:])]
    rows += [[name, *(gb(row[f"{name}_bytes"]) for row in phases)] for name in ("live", "needed")]
    again = "; there may be several, which is counted" if work["micro_batches"] > 1 else ""
    return "\n".join(
        [
            "MEMORY OF A GPU, GB, at the peak of each phase, by a dry run of the training code",
            *table(["", *memory["phases"]], rows),
            f"largest micro-batch: {work['micro_batch_tokens']} tokens of {work['micro_batch_groups']} groups, "
            f"completions of up to {work['max_new_tokens']} tokens{again}",
            f"needed: live, {memory['slack_bytes'] / memory['live_bytes']:.0%} that the allocator loses and "
            f"{gb(memory['context_bytes'])} GB outside of it (both assumed)",
        ]
    )


def _cell(size: float) -> str:
    return gb(size) if size >= 5e7 else ""


def _verdict(plan: dict[str, Any]) -> str:
    memory, micro = plan["memory"], plan["micro_batch"]
    needed, room = gb(memory["needed_bytes"]), gb(memory["room_bytes"])
    if memory["fits"]:
        lines = [f"FITS: {needed} of {room} GB, {gb(memory['free_bytes'])} GB to spare"]
    else:
        lines = [
            f"DOES NOT FIT: {needed} of {room} GB, {gb(-memory['free_bytes'])} GB too much, in {memory['highest']}"
        ]
    if micro["largest"] is None:
        lines.append("no loss.micro_batch_tokens fits: not that of one group either")
    elif micro["largest"] == micro["all_groups"]:
        lines.append(
            f"largest loss.micro_batch_tokens that fits: {micro['largest']}, all of a GPU's groups: more is no use"
        )
    else:
        lines.append(f"largest loss.micro_batch_tokens that fits: {micro['largest']}")
    if plan["levers"]:
        rows = [
            [
                lever["option"],
                gb(lever["needed"]),
                gb(memory["needed_bytes"] - lever["needed"]),
                "fits" if lever["fits"] else "does not",
                "dry run" if lever["dry_run"] else "reckoned",
            ]
            for lever in plan["levers"]
        ]
        lines += ["", *table(["what to change", "needed, GB", "saves", "then it", "by"], rows)]
    return "\n".join(lines)


def _time(plan: dict[str, Any]) -> str:
    time, work = plan["time"], plan["workload"]
    rows = [
        [
            name,
            _seconds(phase["seconds"]),
            f"{phase['seconds'] / time['step_seconds']:.0%}",
            _seconds(phase["communication_seconds"]),
            phase["bound"],
            f"{plan['efficiencies'][name]['value']:.0%} {plan['efficiencies'][name]['source']}",
        ]
        for name, phase in time["phases"].items()
    ]
    rows.append(
        ["step", _seconds(time["step_seconds"]), "", _seconds(time["communication"] * time["step_seconds"]), "", ""]
    )
    return "\n".join(
        [
            "SECONDS OF A STEP: reckoned, not measured",
            *table(["phase", "s", "share", "of it only communicating", "bound by", "of what the rates allow"], rows),
            f"answers of {work['mean_answer_tokens']:g} tokens on average, longest of all GPUs included",
            f"{time['tokens_per_second']:.0f} completion tokens/s, MFU {time['mfu']:.1%}; {time['steps']} steps: "
            f"{time['hours']:.1f} h, {time['gpu_hours']:.0f} GPU-hours, evaluation and checkpoints aside",
        ]
    )


def _scaling(plan: dict[str, Any]) -> str:
    weak, strong = plan["scaling"]["weak"], plan["scaling"]["strong"]
    each = weak[0]["prompts"] / weak[0]["gpus"]
    head = ["GPUs", "prompts", "step, s", "tokens/s", "efficiency", "only communicating", "GPU-hours"]
    return "\n".join(
        [
            f"MORE GPUS, {each:g} prompts a GPU (weak scaling)",
            *table(
                [*head, "GB a GPU"],
                [[*_row(row), gb(row["needed_bytes"]) + ("" if row["fits"] else " *")] for row in weak],
            ),
            "GB a GPU: shards in proportion, all else as planned; * does not fit. Efficiency: tokens/s of a GPU over "
            "those of the first row.",
            "",
            f"MORE GPUS, {plan['workload']['prompts_per_step']} prompts a step (strong scaling)",
            *table(head, map(_row, strong)),
        ]
    )


def _row(row: dict[str, Any]) -> list[str]:
    return [
        str(row["gpus"]),
        str(row["prompts"]),
        _seconds(row["step_seconds"]),
        f"{row['tokens_per_second']:.0f}",
        f"{row['efficiency']:.0%}",
        f"{row['communication']:.0%}",
        f"{row['gpu_hours']:.0f}",
    ]


def _sources(plan: dict[str, Any]) -> str:
    lines = ["WHAT IS ASSUMED (docs/plan.md)"]
    said: dict[tuple[str, float, str], list[str]] = {}
    for name, share in plan["efficiencies"].items():
        said.setdefault((share["source"], share["value"], share["why"]), []).append(name)
    lines += [f"{', '.join(names)}: {value:.0%}, {source}: {why}" for (source, value, why), names in said.items()]
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
