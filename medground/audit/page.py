"""An audit as one self-contained HTML page: errors, warnings, counts, and films with their boxes.

Texts of the data are escaped where they enter the page; it asks no server for anything.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from medground.audit.result import Audit, summary
from medground.audit.suspicions import SIDE, Suspicion
from medground.datasets.contact_sheet import draw_sheet, films_of
from medground.datasets.inventory import written_whole
from medground.records import Example
from medground.report.style import STYLE

FILMS, SHOWN = 24, 200  # films on the sheet; errors and warnings of a kind on the page, the rest are counted


def write_page(audit: Audit, out: Path) -> None:
    """Write the page.

    Args:
        audit: to show.
        out: the HTML file.
    """
    title = escape(f"Audit of {audit.folder.name}")
    body = "".join(
        [
            f'<header><p class="eyebrow">MedGround · data audit</p><h1>{title}</h1></header>',
            f"<pre>{escape(summary(audit))}</pre>",
            _list("Errors", audit.errors),
            _warnings(audit.warnings),
            _counts(audit),
            _sheet("Films", _spread(films_of(audit.examples)), audit.folder),
            _sheet("Films whose side words contradict the box", _sided(audit), audit.folder),
        ]
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE} img {{ max-width: 100%; }} pre {{ overflow-x: auto; }}</style></head>"
        f"<body><main>{body}<footer>Made by <code>medground data audit</code></footer></main></body></html>\n"
    )
    with written_whole(out) as file:
        file.write(page.encode("utf-8", "backslashreplace").decode())


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return f'<section><h2>{title}</h2><p class="nothing">None.</p></section>'
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:SHOWN])
    more = f"<p>and {len(lines) - SHOWN} more</p>" if len(lines) > SHOWN else ""
    return f"<section><h2>{title} ({len(lines)})</h2><ul>{items}</ul>{more}</section>"


def _warnings(warnings: Sequence[Suspicion]) -> str:
    kinds = sorted({warning.kind for warning in warnings})
    if not kinds:
        return _list("Warnings", [])
    return "".join(
        _list(f"Warnings: {kind}", [f"{w.where}: {w.text}" for w in warnings if w.kind == kind]) for kind in kinds
    )


def _counts(audit: Audit) -> str:
    splits = list(audit.counts)
    categories = sorted({name for split in splits for name in audit.counts[split]["categories"]})
    head = "".join(f"<th>{escape(split)}<small>records / boxes</small></th>" for split in splits)
    rows = []
    for category in categories:
        cells = [audit.counts[split]["categories"].get(category, {"records": 0, "boxes": 0}) for split in splits]
        text = "".join(f"<td>{cell['records']} / {cell['boxes']}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(category)}</th>{text}</tr>')
    licence = escape(str((audit.manifest or {}).get("licence", "not stated")))
    return (
        f'<section><h2>Classes</h2><div class="scroll"><table><thead><tr><th>Category</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><p>Licence: {licence}</p></section>"
    )


def _sheet(title: str, films: Sequence[Sequence[Example]], folder: Path) -> str:
    if not films:
        return ""
    buffer = io.BytesIO()
    draw_sheet(folder, films, columns=min(6, len(films))).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<section><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}"></section>'


def _spread(films: list[list[Example]]) -> list[list[Example]]:
    """Films from all over the data set."""
    step = max(1, len(films) // FILMS)
    return films[::step][:FILMS]


def _sided(audit: Audit) -> list[list[Example]]:
    suspicious = {warning.where for warning in audit.warnings if warning.kind == SIDE}
    return [[example] for example in audit.examples if example.id in suspicious][:FILMS]
