"""A run's folder -> one self-contained HTML page that a colleague can open anywhere.

Everything is inside the file: images as data URLs, charts as SVG, style and script. It asks no server for
anything. Texts of data, model and configuration are escaped where they enter the page.
"""

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from medground.datasets.folders import folders_hash
from medground.datasets.inventory import file_hash, read_manifest
from medground.report.gallery import gallery
from medground.report.run_files import RunFiles, read_run
from medground.report.style import SCRIPT, STYLE
from medground.report.tables import category_table, headline_table, notes, sentence, tiles
from medground.report.training_charts import threshold_chart, training_charts


def write_report(run: Path, data: Sequence[str], out: Path) -> None:
    """Write the page of a run; one that is still going on says what is not there yet.

    Args:
        run: folder of the run (docs/run_folder.md).
        data: folders of the run's records, as its configuration has them in `data.path`.
        out: the HTML file to write, below 5 MB.

    Raises:
        ValueError: config.json or environment.json is missing, a file is damaged, or an image cannot be read.
    """
    Path(out).write_bytes(render(run, data))


def render(run: Path, data: Sequence[str], script: str = "") -> bytes:
    """The page's HTML, UTF-8; arguments and errors as of `write_report`.

    Args:
        run: its folder.
        data: folders of its records.
        script: of a page that is served, which asks its server for news; "" for a file, which asks nobody.
    """
    files = read_run(Path(run))
    sections = [
        _header(files),
        _results(files),
        _section("training", "Training", training_charts(files) if files.metrics else _nothing("No step yet.")),
        _section("films", "Test films", gallery(files, data)),
        _section("setup", "Setup", _setup(files, data)),
    ]
    return document(_title(files), "".join(sections), script)


def document(title: str, body: str, script: str = "") -> bytes:
    """A page around `body`, UTF-8; with a script that asks its server, it may ask that one and no other."""
    connect = " connect-src 'self';" if script else ""
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing is fetched, whatever a text of the data may say
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\';{connect} img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(title)} · MedGround</title><style>{STYLE}</style></head>"
        f"<body><main>{body}<footer>Made by <code>medground report</code></footer></main>"
        f"<script>{SCRIPT}</script>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )
    # a lone surrogate has no UTF-8 form; it is shown by its number
    return text.encode("utf-8", "backslashreplace")


def _title(run: RunFiles) -> str:
    return "/".join(Path(run.config.out).parts[-2:])


def _header(run: RunFiles) -> str:
    summary, environment = run.summary or {}, run.environment
    steps = str(run.steps_done) if run.summary else f"{run.steps_done} of {run.config.steps or _epochs(run)}"
    facts = {
        "Model": run.config.model.path,
        "Data": run.config.data.path,
        "Test records": len(run.films) or "",
        "Machine": summary.get("machine") or environment.get("machine"),
        "Ranks": summary.get("ranks") or environment.get("ranks"),
        "Steps": steps,
        "Seed": run.config.seed,
        "Training": _duration(summary.get("seconds_training")),
        "Commit": str(environment.get("commit") or "")[:10],
        "Page written": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    known = "".join(
        f"<div><dt>{name}</dt><dd>{escape(_text(value))}</dd></div>"
        for name, value in facts.items()
        if value not in ("", None)
    )
    return (
        f'<header><p class="eyebrow">MedGround · run report</p><h1>{escape(_title(run))}</h1>'
        f'<dl class="facts">{known}</dl>{_progress(run)}</header>'
    )


def _epochs(run: RunFiles) -> str:
    return f"{run.config.epochs} epoch{'s' * (run.config.epochs > 1)}"


def _progress(run: RunFiles) -> str:
    """What a run in progress has not written yet; "" for a finished one."""
    if run.summary:
        return ""
    missing = [
        text
        for absent, text in (
            (not run.metrics, "training steps"),
            ("before" not in run.evaluations, "the evaluation before training"),
            ("after" not in run.evaluations, "the evaluation after training"),
            (True, "the summary"),
        )
        if absent
    ]
    config = run.config
    done = f"{run.steps_done} of {config.steps} steps" if config.steps else f"{run.steps_done} steps of {_epochs(run)}"
    return f'<p class="progress"><b>In progress:</b> {done}. Not there yet: {", ".join(missing)}.</p>'


def _results(run: RunFiles) -> str:
    words = sentence(run)
    lead = f'<p class="lead">{words}</p>' if words else ""
    categories = category_table(run)
    detail = f'<div class="pair"><div>{categories}</div>{threshold_chart(run.films)}</div>' if categories else ""
    return _section("results", "Results", f"{lead}{tiles(run)}{headline_table(run)}{notes(run)}{detail}")


def _setup(run: RunFiles, data: Sequence[str]) -> str:
    parts = {"Configuration": dataclasses.asdict(run.config), "Environment": run.environment, "Data": _data(run, data)}
    if run.summary:
        parts["Summary"] = run.summary
    return "".join(f"<details><summary>{name}</summary>{_values(values)}</details>" for name, values in parts.items())


def _data(run: RunFiles, folders: Sequence[str]) -> dict[str, Any]:
    """What the folders hold now, by SHA-256, and whether that is what the run was started with."""
    found: dict[str, Any] = {}
    for folder in folders:
        files = {name: Path(folder) / name for name in ("records.jsonl", "images.jsonl", "manifest.json")}
        found[str(folder)] = {f"{name}, SHA-256": file_hash(path) for name, path in files.items() if path.is_file()}
        for name, value in (read_manifest(Path(folder)) or {}).items():
            if name in ("source", "command", "licence", "versions"):
                found[str(folder)][f"manifest.{name}"] = value
    started = run.environment.get("data_sha256")
    if started and all((Path(folder) / "records.jsonl").is_file() for folder in folders):
        now = folders_hash(folders)
        found["records as the run was started with"] = "yes" if now == started else f"no: {started} then, {now} now"
    return found


def _values(values: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(_text(value))}</td></tr>' for key, value in _flat(values)
    )
    return f'<div class="scroll"><table class="values"><tbody>{rows}</tbody></table></div>'


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        out += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return out


def _text(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _nothing(text: str) -> str:
    return f'<p class="nothing">{text}</p>'


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{body}</section>'
