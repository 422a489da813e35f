"""The tables of the page: headline numbers, all metrics with their controls, metrics by category."""

from collections.abc import Mapping
from html import escape

from medground.report.plots import DASH, range_bar
from medground.report.run_files import Row, RunFiles

COLUMNS = {
    "before": ("Before", "step 0", 1),
    "after": ("After", "last step", 0),
    "before_shuffled": ("Before, shuffled", "another's image", 3),
    "after_shuffled": ("After, shuffled", "another's image", 3),
    "after_blank": ("After, blank", "a grey image", 3),
    "after_flipped": ("After, mirrored", "and mirrored back", 2),
    "blind": ("Blind baseline", "best constant box", 5),
    "whole": ("Whole image", "no model", 5),
    "centre": ("Its middle", "no model", 5),
}  # heading, explanation, color
HEADLINE = {
    "miou": ("Mean IoU", "overlap with the true boxes, where there are any"),
    "acc@0.5": ("IoU above 0.5", "share of the same records"),
    "side": ("Correct side", "of phrases that say left or right"),
    "absent": ("Absent, and said so", "nothing drawn where there is nothing to find"),
    "parse_failures": ("Unreadable answers", "lower is better"),
}
FURTHER = {
    "acc@0.3": ("IoU above 0.3", "share of records with a true box"),
    "acc@0.7": ("IoU above 0.7", "share of records with a true box"),
    "centre_hit": ("Centre hit", "centre of the first box inside a true box"),
    "false_empty": ("Wrongly empty", "nothing drawn where there is something; lower is better"),
}
_PLAIN = ("miou",)  # as a fraction; the rest are shares, in per cent


def tiles(run: RunFiles) -> str:
    """The headline metrics, one tile each: before -> after."""
    cells = []
    for name, (label, _) in HEADLINE.items():
        before, after = (_estimate(run, column, name) for column in ("before", "after"))
        main = after or before
        if main is None:
            continue
        old = f'<span class="old">{show(name, before["value"])}</span>' if after and before else ""
        arrow = '<span class="arrow" aria-label="to">→</span>' if old else ""
        state = "" if after else '<span class="small">before training</span>'
        cells.append(
            f'<div class="tile"><h3>{label}</h3><p class="big">{old}{arrow}<b>{show(name, main["value"])}</b></p>'
            f'<p class="small">95 %: {interval(name, main)}<span>n = {main["n"]}</span></p>{state}</div>'
        )
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def headline_table(run: RunFiles) -> str:
    """Every metric (rows) before, after, and of the controls (columns), each with its interval."""
    columns = [name for name in COLUMNS if name in run.evaluations or _estimate(run, name, "miou")]
    if not columns:
        return '<p class="nothing">No evaluation of the test records yet.</p>'
    head = "".join(f'<th scope="col">{COLUMNS[c][0]}<small>{COLUMNS[c][1]}</small></th>' for c in columns)
    top = "".join(_metric_row(run, name, *text, columns) for name, text in HEADLINE.items())
    more = "".join(_metric_row(run, name, *text, columns) for name, text in FURTHER.items())
    many = " many" if len(columns) > 6 else ""
    start = f'<table class="metrics{many}"><thead><tr><th scope="col">Test records</th>{head}</tr></thead><tbody>'
    return (
        f'<div class="scroll">{start}{top}</tbody></table></div>'
        f'<details><summary>More metrics</summary><div class="scroll">{start}{more}</tbody></table></div></details>'
    )


def notes(run: RunFiles) -> str:
    """What the columns mean, of those that are there."""
    texts = ["Intervals: 95 %, bootstrap over patients."]
    if {"before_shuffled", "after_shuffled"} & run.evaluations.keys():
        texts.append(
            "Shuffled: every phrase with the image of another patient; what the model scores there it scores without "
            "looking."
        )
    if "after_blank" in run.evaluations:
        texts.append("Blank: with a grey image.")
    if flipped := run.evaluations.get("after_flipped"):
        texts.append(
            "Mirrored: with the image mirrored and left and right swapped in the phrase, boxes mirrored back; a model "
            "that reads both scores as on the film itself."
        )
        if (found := flipped.get("agreement")) and found["value"] is not None:
            texts.append(
                f"Those boxes overlap the plain ones with an IoU of {found['value']:.3f} ({interval('miou', found)})."
            )
    if _estimate(run, "blind", "miou"):
        texts.append("Blind baseline: for every phrase the constant box that fits the training records best.")
    if "centre" in run.evaluations:
        texts.append("Whole image and its middle: one box for every phrase, of all and of half of width and height.")
    return f'<p class="note">{" ".join(texts)}</p>'


def category_table(run: RunFiles) -> str:
    """mIoU and acc@0.5 by category, before and after; the largest categories first."""
    before, after = (run.evaluations.get(name, {}).get("by_category", {}) for name in ("before", "after"))
    latest = after or before
    order = sorted(latest, key=lambda category: (-latest[category]["miou"]["n"], category))
    rows = []
    for category in order:
        cells = []
        for name in ("miou", "acc@0.5"):
            pair = [found[category][name] if category in found else None for found in (before, after)]
            cells += [f"<td>{show(name, e['value']) if e else DASH}</td>" for e in pair]
            cells.append(f'<td class="wide">{_bars(name, pair)}</td>')
        n = latest[category]["miou"]["n"]
        rows.append(f'<tr><th scope="row"><bdi>{escape(category)}</bdi></th><td>{n}</td>{"".join(cells)}</tr>')
    if not rows:
        return ""
    group = '<th scope="colgroup" colspan="3">{}</th>'
    sub = '<th scope="col">before</th><th scope="col">after</th><th scope="col" class="wide">95 %</th>'
    return (
        '<div class="scroll"><table class="categories"><thead>'
        f'<tr><th rowspan="2" scope="col">Category</th><th rowspan="2" scope="col">n</th>'
        f"{group.format('Mean IoU')}{group.format('IoU above 0.5')}</tr><tr>{sub}{sub}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def sentence(run: RunFiles) -> str:
    """The result in words, plain text; "" without an evaluation after training."""
    miou = {name: e["value"] for name in COLUMNS if (e := _estimate(run, name, "miou")) and e["value"] is not None}
    if "before" not in miou or "after" not in miou:
        return ""
    step = run.evaluations["after"]["step"]
    controls = []
    if "after_shuffled" in miou:
        controls.append(f"the trained model shown another patient's image gets {miou['after_shuffled']:.3f}")
    if "blind" in miou:
        controls.append(f"the best constant answer per phrase, which sees no image, {miou['blind']:.3f}")
    against = f" For comparison, {', and '.join(controls)}." if controls else ""
    return (
        f"On the test records, the mean overlap (IoU) of drawn and true boxes went from {miou['before']:.3f} to "
        f"{miou['after']:.3f} in {step} steps.{against}"
    )


def show(name: str, value: float | None) -> str:
    """A metric's value as the tables print it."""
    if value is None:
        return DASH
    return f"{value:.3f}" if name in _PLAIN else f"{100 * value:.1f}\u202f%"


def interval(name: str, estimate: Row) -> str:
    """A metric's interval as the tables print it; "" when only its value is known."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return ""
    return f"{low:.3f}{DASH}{high:.3f}" if name in _PLAIN else f"{100 * low:.1f}{DASH}{100 * high:.1f}"


def _metric_row(run: RunFiles, name: str, label: str, hint: str, columns: list[str]) -> str:
    counts = {e["n"] for c in columns if (e := _estimate(run, c, name)) and e["n"] is not None}
    n = f" · n\u00a0=\u00a0{counts.pop()}" if len(counts) == 1 else ""
    cells = "".join(_cell(name, _estimate(run, column, name), COLUMNS[column][2]) for column in columns)
    return f'<tr><th scope="row">{label}<small>{hint}{n}</small></th>{cells}</tr>'


def _cell(name: str, estimate: Row | None, color: int) -> str:
    if estimate is None or estimate["value"] is None:
        return f'<td class="none">{DASH}</td>'
    value, span = estimate["value"], interval(name, estimate)
    bounds = (estimate["low"], estimate["high"]) if span else (value, value)
    bar = range_bar([(value, *bounds, color)], f"{show(name, value)} {span}")
    return f"<td><b>{show(name, value)}</b><small>{span or '&nbsp;'}</small>{bar}</td>"


def _bars(name: str, pair: list[Row | None]) -> str:
    known = [(e, color) for e, color in zip(pair, (1, 0), strict=True) if e and e["value"] is not None]
    bars = [(e["value"], e["low"], e["high"], color) for e, color in known]
    return range_bar(bars, ", ".join(interval(name, e) for e, _ in known)) if bars else ""


def _estimate(run: RunFiles, column: str, metric: str) -> Row | None:
    """{"value", "low", "high", "n"} of an evaluation.

    Of the blind baseline, older runs have the mean IoU alone, in the summary.
    """
    if column != "blind" or column in run.evaluations:
        metrics: Mapping[str, Row] = run.evaluations.get(column, {}).get("metrics", {})
        return metrics.get(metric)
    summary = run.summary or {}
    if metric != "miou" or summary.get("miou_blind_baseline") is None:
        return None
    low, high = summary.get("miou_blind_baseline_interval", (None, None))
    return {"value": summary["miou_blind_baseline"], "low": low, "high": high, "n": None}
