"""A reward audit in words: a table for the terminal, and one self-contained HTML page with films.

Texts of the data are escaped where they enter the page; it asks no server for anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageColor, ImageDraw

from medground.datasets.folders import image_path
from medground.datasets.images import read_image
from medground.datasets.inventory import written_whole
from medground.records import Box
from medground.report.plots import DASH
from medground.report.style import STYLE

if TYPE_CHECKING:
    from medground.audit.earnings import Earned

FILMS, SIDE, GREYS = 6, 320, 24  # films on the page, their longest side in pixels, their greys
DRAWN = {  # whose boxes are drawn -> colour
    "truth": "#3ddc97",
    "25 % off": "#ffb000",
    "whole image": "#ff5fa2",
    "tiny box in place": "#ff7043",
    "centre box": "#b48cf0",
    "blind prior": "#40c4ff",
    "mirror side": "#e6ee5c",
}
PLACES = {"present": "records with a finding", "absent": "records without one"}


def table(found: dict[str, Any]) -> str:
    """The audit as text: what each policy earns, and the verdict."""
    reward = found["reward"]
    kinds = [f"spatial {reward['spatial']}"]
    kinds += [f"semantic {reward['semantic']} x {reward['semantic_weight']:g}"] if reward["semantic_weight"] else []
    records = found["records"]
    lines = [
        f"{', '.join(kinds)}; template {found['template']}; {records['present']} records with a finding, "
        f"{records['absent']} without; seed {found['seed']}"
    ]
    for place, title in PLACES.items():
        if records[place]:
            lines += ["", title, *_rows(found, place)]
    correlations = found["spearman"]
    told = ", ".join(f"{name} completions {_number(value, 2)}" for name, value in correlations.items())
    return "\n".join([*lines, "", f"Spearman of reward and IoU, with a finding: {told}", *verdict(found)])


def verdict(found: dict[str, Any]) -> list[str]:
    """Which cheats are above the rough truth, one line each; or that none is."""
    above, level = found["cheats_above_jittered_truth"], found["cheats_not_told_apart"]
    lines = [
        f"above the truth 25 % off, {PLACES[row['records']]}: {row['cheat']}, by {_interval(row)}" for row in above
    ]
    lines = lines or ["no degenerate policy earns more than the truth 25 % off"]
    return lines + [f"not told apart from it, {PLACES[r['records']]}: {r['cheat']}, {_interval(r)}" for r in level]


def _keys(found: dict[str, Any]) -> dict[str, str]:
    """Of a table: key of the means -> heading."""
    first = next(iter(found["policies"].values()))
    means = first["present"] or first["absent"]
    parts = {key: key.removeprefix("reward_") for key in means if key.startswith("reward_")}
    keys = {"reward": "reward"} | parts | {"iou": "IoU"}
    if "advantage" in means:
        keys |= {"advantage": "adv.", "advantage_mean_only": "adv. (mean)"}
    return keys


def _rows(found: dict[str, Any], place: str) -> list[str]:
    keys = _keys(found)
    lines = [f"  {'':20}" + "".join(f"{heading:>12}" for heading in keys.values()) + f"{'against 25 % off':>28}"]
    for name, policy in found["policies"].items():
        means = policy[place]
        if means is not None:
            against = found["against_jittered_truth"][place].get(name)
            row = f"  {name:20}" + "".join(f"{means[key]:12.3f}" for key in keys)
            lines.append(row + (f"{_interval(against):>28}" if against else ""))
    return lines


def _number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def write_page(found: dict[str, Any], earned: Earned, folders: Sequence[str], out: Path) -> None:
    """Write the page.

    Args:
        found: of `judge`, with what it depends on.
        earned: every completion's earnings.
        folders: of the data.
        out: the HTML file.

    Raises:
        ValueError: an image cannot be read.
    """
    title = escape(f"Reward audit of {', '.join(Path(folder).name for folder in folders)}")
    kind = "above" if found["cheats_above_jittered_truth"] else "none"
    body = "".join(
        [
            f'<header><p class="eyebrow">MedGround · reward audit</p><h1>{title}</h1></header>',
            f'<section><h2>Verdict</h2><ul class="{kind}">',
            *(f"<li>{escape(line)}</li>" for line in verdict(found)),
            "</ul></section>",
            *(_table(found, place) for place in PLACES if found["records"][place]),
            _films(earned, folders),
            _options(found),
        ]
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE} img {{ max-width: 100%; }} td, th {{ padding: 5px 10px; }} "
        ".films { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 18px; } "
        ".films i { display: inline-block; width: 12px; height: 12px; }</style></head>"
        f"<body><main>{body}<footer>Made by <code>medground audit rewards</code></footer></main></body></html>\n"
    )
    with written_whole(out) as file:
        file.write(page.encode("utf-8", "backslashreplace").decode())


def _table(found: dict[str, Any], place: str) -> str:
    keys = _keys(found)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in keys.values())
    rows = []
    for name, policy in found["policies"].items():
        means = policy[place]
        if means is None:
            continue
        against = found["against_jittered_truth"][place].get(name)
        cells = "".join(f"<td>{means[key]:.3f}</td>" for key in keys)
        about = f"<small>{escape(policy['about'])}</small>"
        difference = f"<td>{_interval(against) if against else DASH}</td>"
        rows.append(f'<tr><th scope="row">{escape(name)}{about}</th>{cells}{difference}</tr>')
    count = found["records"][place]
    return (
        f"<section><h2>{PLACES[place].capitalize()} ({count})</h2>"
        f'<div class="scroll"><table><thead><tr><th>Policy</th>{head}<th>against 25 % off'
        f"<small>95 %, by patient</small></th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _films(earned: Earned, folders: Sequence[str]) -> str:
    shown = [row for row, example in enumerate(earned.examples) if example.boxes]
    if not shown:
        return ""
    chosen = shown[:: max(1, len(shown) // FILMS)][:FILMS]
    cards = "".join(_film(earned, row, folders) for row in chosen)
    return f'<section><h2>Films</h2><div class="films">{cards}</div></section>'


def _film(earned: Earned, row: int, folders: Sequence[str]) -> str:
    example = earned.examples[row]
    film = read_image(image_path(folders, example.image))
    scale = SIDE / max(film.size)
    picture = film.resize((max(1, round(film.width * scale)), max(1, round(film.height * scale))))
    draw = ImageDraw.Draw(picture)
    lines = []
    for name, colour in DRAWN.items():
        column = earned.names.index(name)
        if not earned.said[row, column]:
            continue
        for x1, y1, x2, y2 in earned.boxes[row][column] or ():
            if x1 <= x2 and y1 <= y2:
                corners = _on_picture((x1, y1, x2, y2), scale)
                draw.rectangle(corners, outline=ImageColor.getrgb(colour), width=2)
        paid, iou = earned.rewards.total[row, column].item(), earned.rewards.iou[row, column].item()
        lines.append(f'<li><i style="background: {colour}"></i> {name}: {paid:.3f}, IoU {iou:.2f}</li>')
    buffer = io.BytesIO()
    picture.quantize(palette=_palette(), dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    phrase = escape(example.phrase)
    return (
        f'<div><img alt="{phrase}" src="data:image/png;base64,{data}"><h3>{phrase}</h3>'
        f'<p class="small">{escape(example.id)}</p><ul class="small">{"".join(lines)}</ul></div>'
    )


def _palette() -> Image.Image:
    """The colours and few greys, so that a film stays grey and its file small."""
    colours = [value for colour in DRAWN.values() for value in ImageColor.getrgb(colour)]
    greys = [value for step in range(GREYS) for value in [round(255 * step / (GREYS - 1))] * 3]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours + greys)
    return palette


def _on_picture(box: Box, scale: float) -> Box:
    """Corners of its outline; of a box of less than a pixel on the picture, the one pixel."""
    x1, y1, x2, y2 = (v * scale for v in box)
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)


def _options(found: dict[str, Any]) -> str:
    told = {key: found[key] for key in ("template", "seed", "split", "group_size")} | found["reward"]
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>' for key, value in told.items()
    )
    spearman = ", ".join(f"{name} {_number(value, 2)}" for name, value in found["spearman"].items())
    return (
        f"<section><h2>Options</h2><p>Spearman of reward and IoU: {spearman}</p>"
        f'<details><summary>all</summary><table class="values"><tbody>{rows}</tbody></table></details></section>'
    )
