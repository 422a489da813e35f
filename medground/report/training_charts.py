"""The charts of the page: what metrics.jsonl and the small evaluations say over the steps of training."""

from medground.report.plots import Series, line_chart, stacked_chart
from medground.report.run_files import Film, Row, RunFiles, drawable

THRESHOLDS = tuple(i / 50 for i in range(51))
_SMOOTH_FROM = 20  # fewer steps are drawn as they are


def training_charts(run: RunFiles) -> str:
    """All charts over steps, as figures in reading order: results first, then the health of the optimisation."""
    window = max(5, len(run.metrics) // 15) if len(run.metrics) >= _SMOOTH_FROM else 0

    def series(name: str, key: str, color: int = 0) -> Series:
        return Series(name, [row["step"] for row in run.metrics], [row.get(key) for row in run.metrics], color, window)

    def single(title: str, key: str, floor: float | None = 0.0) -> str:
        return line_chart(title, [series(title, key)], floor=floor)

    rewards = [
        series("weighted sum", "reward"),
        series("spatial", "reward_spatial", 2),
        series("format", "reward_format", 3),
        series("semantic", "reward_semantic", 1),
        series("length", "reward_length", 4),
        series("custom", "reward_custom", 6),
    ]
    overlap = [series("IoU", "iou"), series("threshold of the curriculum", "threshold", 1)]
    waste = [
        series("groups that all earned the same", "zero_spread_groups", 1),
        series("completions cut", "truncated", 4),
    ]
    clips = [series("clipped below", "clip_low", 1), series("clipped above", "clip_high", 4)]
    figures = [
        held_out_chart(run.curve),
        line_chart("IoU of sampled completions", overlap, floor=0.0),
        line_chart("Reward: weighted sum, and parts before their weights", rewards, floor=0.0),
        single("Tokens per completion", "completion_length"),
        line_chart("Groups without spread, completions cut", waste, floor=0.0),
        single("Entropy, nats per token", "entropy"),
        single("Log-prob gap: training against rollout, nats per token", "logp_gap"),
        single("KL from the reference" + ("" if run.config.loss.beta else " (beta 0: none)"), "kl"),
        line_chart("Tokens clipped, as fractions", clips, floor=0.0),
        single("Gradient norm before clipping", "grad_norm"),
        line_chart("Learning rate", [Series("learning rate", *_columns(run.metrics, "lr"))], floor=0.0),
        single("Completion tokens per second, all ranks", "tokens_per_second"),
        phase_chart(run.metrics),
    ]
    if any(row.get("mfu") is not None for row in run.metrics):
        figures.append(single("MFU: operations over the GPUs' bfloat16 peak", "mfu"))
    return f'<div class="charts">{"".join(figures)}</div>'


def held_out_chart(curve: list[Row]) -> str:
    """Greedy mIoU of the small evaluations with its 95 % band."""
    found = [row["metrics"]["miou"] for row in curve]
    steps = [row["step"] for row in curve]
    value, low, high = ([estimate[key] for estimate in found] for key in ("value", "low", "high"))
    title = "Held-out mean IoU, greedy (95 % band)"
    return line_chart(title, [Series("mean IoU", steps, value, 0, 0, low, high, dots=True)], floor=0.0)


def phase_chart(metrics: list[Row]) -> str:
    """Seconds of a step by phase, stacked; what no phase accounts for is "other"."""
    phases = {"decode": 0, "prefill": 4, "update": 2, "optimizer": 7, "score": 6, "reward": 3, "data": 1}
    steps = [row["step"] for row in metrics]
    parts = [
        Series(name, steps, [row.get(f"seconds_{name}") for row in metrics], color) for name, color in phases.items()
    ]
    rest = [max(0.0, row["seconds"] - sum(row.get(f"seconds_{name}") or 0.0 for name in phases)) for row in metrics]
    return stacked_chart("Seconds per step, by phase", [*parts, Series("other", steps, rest, 5)])


def threshold_chart(films: list[Film]) -> str:
    """The share of records with a true box whose IoU exceeds a threshold, for every threshold."""
    shown = [film for film in films if drawable(film.record["truth"])]
    lines = []
    for name, color in (("before", 1), ("after", 0)):
        ious = [row["iou"] for film in shown if (row := getattr(film, name))]
        if ious:
            share = [sum(iou > threshold for iou in ious) / len(ious) for threshold in THRESHOLDS]
            lines.append(Series(name, THRESHOLDS, share, color))
    return line_chart("Share of records with an IoU above the threshold", lines, "threshold", floor=0.0)


def _columns(metrics: list[Row], key: str) -> tuple[list[float], list[float | None]]:
    return [row["step"] for row in metrics], [row.get(key) for row in metrics]
