"""Data on CPUs: images a second of loading and of preparing, and what 100,000 records take.

    python -m bench.data                  all
    python -m bench.data memory           a part: loading, preparing, memory, stream

Loading is measured by format of the image files and number of workers, in turns, beside a plain loop of PIL.open and
the processor. Memory is the most that a process of its own held, beyond what it held before, and its seconds are its
CPU's.
"""

import argparse
import csv
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, redirect_stdout
from pathlib import Path
from statistics import median
from typing import NamedTuple

from PIL import Image

SIDE = 640  # of the films, as MedRPG's MS-CXR has it
PARTS = ("loading", "preparing", "memory", "stream")


class Measured(NamedTuple):
    """What a call in a process of its own took: CPU seconds, and the most memory beyond what it began with."""

    seconds: float
    megabytes: float


def draw(folder: Path, films: int) -> dict[str, Path]:
    """A data folder of phantom films for each format."""
    from medground.datasets.manifest import load_records, write_records
    from medground.datasets.phantom import PhantomConfig, write_phantom

    options = {"PNG": {}, "16-bit PNG": {"bits": 16}, "DICOM": {"dicom": True}}
    found = {}
    for name, option in options.items():
        found[name] = folder / name
        write_phantom(PhantomConfig(out=str(folder / name), count=films, val=0, test=0, size=SIDE, **option), workers=1)
    found["JPEG"] = folder / "JPEG"
    (folder / "JPEG" / "images").mkdir(parents=True)
    examples = load_records(found["PNG"])
    for image in {example.image for example in examples}:
        Image.open(found["PNG"] / image).save(found["JPEG"] / Path(image).with_suffix(".jpg"), quality=95)
    renamed = [{**vars(e), "image": str(Path(e.image).with_suffix(".jpg"))} for e in examples]
    write_records(found["JPEG"], [type(examples[0])(**values) for values in renamed])
    return found


def loading(
    folders: dict[str, Path], workers: Iterable[int], rounds: int, least: int
) -> dict[str, dict[str, list[float]]]:
    """Images a second, round by round: format -> side -> rates."""
    from bench.random_model import SIZES, make_processor
    from medground.datasets.manifest import load_records
    from medground.loading import Loader, PromptMaker, Question
    from medground.prompts import make_prompt

    processor = make_processor(512, SIZES["tiny"])
    processor.images.size = {"shortest_edge": 56 * 56, "longest_edge": 644 * 644}
    rates: dict[str, dict[str, list[float]]] = {}
    for name, folder in folders.items():
        make = PromptMaker((str(folder),), processor, "plain")
        films = {example.image: Question(example) for example in load_records(folder)}
        questions = list(films.values()) * -(-least // len(films))

        def plain(make: PromptMaker = make, questions: list[Question] = questions) -> None:
            for question in questions:
                picture = Image.open(Path(make.folders[0]) / question.example.image).convert("RGB")
                make_prompt(question.example, picture, make.processor, make.template)

        sides: dict[str, Callable[[], object]] = {} if name == "DICOM" else {"plain loop": plain}
        with ExitStack() as stack:
            for count in workers:
                load = stack.enter_context(closing(Loader(make, workers=count, ahead=16)))
                side = f"{count} worker{'s' * (count > 1)}" if count else "thread"
                sides[side] = lambda load=load, questions=questions: sum(1 for _ in load(questions))
            found: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(rounds + 1):
                for side, call in sides.items():
                    start = time.perf_counter()
                    call()
                    if number:  # the first starts workers and fills caches
                        found[side].append(len(questions) / (time.perf_counter() - start))
        rates[name] = found
    return rates


def preparing(folders: dict[str, Path], out: Path, workers: Iterable[int]) -> dict[str, dict[str, float]]:
    """Films a second of `medground data prepare csv`, kept at their size: format -> side -> rate."""
    from medground.datasets.manifest import load_records
    from medground.datasets.own_csv import OwnCsvConfig, prepare_csv

    rates: dict[str, dict[str, float]] = {}
    for name, folder in folders.items():
        table = out / f"{name}.csv"
        write_table(table, [(e.image, e.phrase, *box) for e in load_records(folder) for box in e.boxes])
        films = len(list((folder / "images").iterdir()))
        rates[name] = {}
        for count in workers:
            options = {"annotations": str(table), "images": str(folder), "out": str(out / f"{name}-{count}")}
            start = time.perf_counter()
            with redirect_stdout(sys.stderr):
                prepare_csv(OwnCsvConfig(**options, workers=count))
            rates[name][f"{count} worker{'s' * (count > 1)}"] = films / (time.perf_counter() - start)
    return rates


def write_table(path: Path, rows: Iterable[tuple[object, ...]]) -> None:
    """A CSV file as `prepare csv` reads it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "phrase", "x1", "y1", "x2", "y2"))
        writer.writerows(rows)


def large(folder: Path, records: int) -> Path:
    """A data folder of many records, each with an image file of its own (links to a few)."""
    from medground.datasets.manifest import write_records
    from medground.records import Example

    (folder / "images").mkdir(parents=True)
    examples = []
    for i in range(records):
        name = f"images/{i:06d}.png"
        if i % 10_000:  # a file may have only so many links
            os.link(folder / f"images/{i - i % 10_000:06d}.png", folder / name)
        else:
            Image.new("L", (64, 64)).save(folder / name)
        split = ("train", "train", "train", "val", "test")[i % 5]
        boxes = ((4.0, 4.0, 20.0 + i % 40, 30.0),)
        texts = "small left apical pneumothorax", "pneumothorax", f"p{i}", f"s{i}", "made up", split
        examples.append(Example(f"r{i}", name, 64, 64, texts[0], boxes, *texts[1:]))
    write_records(folder, examples)
    return folder


def read_all(folder: Path) -> None:
    """What training does before its first step."""
    from medground.datasets.manifest import load_records

    load_records(folder)


def stream_half(folder: Path) -> None:
    """Prompts of half of a large folder's records through the loader with two workers, one after another."""
    from bench.random_model import SIZES, make_processor
    from medground.datasets.manifest import load_records
    from medground.loading import Loader, PromptMaker, Question

    examples = load_records(folder)
    make = PromptMaker((str(folder),), make_processor(512, SIZES["tiny"]), "plain")
    with closing(Loader(make, workers=2, ahead=16)) as load:
        count = sum(1 for _ in load(map(Question, examples[: len(examples) // 2])))
    assert count == len(examples) // 2


def audit_headers(folder: Path) -> None:
    """`medground data audit --headers-only`."""
    from medground.audit.audit import AuditConfig, audit_folder

    audit_folder(AuditConfig(folder=str(folder), headers_only=True))


def prepare_many(folder: Path) -> None:
    """`medground data prepare csv` of a large folder's films, made smaller, by one worker in this process."""
    from medground.datasets.own_csv import OwnCsvConfig, prepare_csv

    out = tempfile.mkdtemp(dir=folder.parent)
    options = {"annotations": str(folder / "table.csv"), "images": str(folder), "out": out}
    with redirect_stdout(sys.stderr):  # links: one picture, one split
        prepare_csv(OwnCsvConfig(**options, longest_side=32, workers=1, val=0, test=0))


def apart(function: Callable[[Path], None], folder: Path) -> Measured:
    """A call in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, function, folder).result()


def _measure(function: Callable[[Path], None], folder: Path) -> Measured:
    before, start = _status("VmRSS"), time.process_time()
    function(folder)
    return Measured(time.process_time() - start, (_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """kB of this process; what getrusage knows it may have from the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def render_rates(title: str, rates: dict[str, dict[str, list[float]]]) -> str:
    """A Markdown table: median, least and most of each format and side."""
    sides = list(dict.fromkeys(side for found in rates.values() for side in found))
    lines = [f"| {title} | " + " | ".join(sides) + " |", "|---|" + "---:|" * len(sides)]
    for name, found in rates.items():
        cells = [
            f"{median(found[side]):.1f} ({min(found[side]):.1f}-{max(found[side]):.1f})" if side in found else ""
            for side in sides
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory(folder: Path, records: int) -> Iterator[tuple[int, str, Measured]]:
    """Records, what was done with them, what it took; each for a tenth of the records first."""
    calls: dict[str, Callable[[Path], None]] = {"load_records": read_all, "audit, headers": audit_headers}
    few, many = (large(folder / str(count), count) for count in (records // 10, records))
    for share in (records // 100, records // 25):
        write_table(few / "table.csv", [(f"images/{i:06d}.png", "a", 4, 4, 20, 30) for i in range(share)])
        yield share, "prepare csv", apart(prepare_many, few)
    for title, call in calls.items():
        yield records // 10, title, apart(call, few)
        yield records, title, apart(call, many)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without any")
    parser.add_argument("--films", type=int, default=24, help="films of each format")
    parser.add_argument("--images", type=int, default=48, help="loaded a round, the films over and over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=100_000, help="of the large folder")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    parts = args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"parts: want some of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = draw(folder / "films", args.films) if set(parts) - {"memory", "stream"} else {}
        if "loading" in parts:
            rates = loading(folders, args.workers, args.rounds, args.images)
            print(render_rates(f"loaded, {SIDE}x{SIDE}, images/s", rates), end="\n\n", flush=True)
        if "preparing" in parts:
            prepared = preparing(folders, folder, [count for count in args.workers if count])
            rates = {name: {side: [rate] for side, rate in found.items()} for name, found in prepared.items()}
            print(render_rates("prepared (csv), films/s", rates), end="\n\n", flush=True)
        if "memory" in parts:
            print("| records | what | CPU s | MB at the peak |\n|---:|---|---:|---:|", flush=True)
            for records, what, found in memory(folder, args.records):
                print(f"| {records} | {what} | {found.seconds:.1f} | {found.megabytes:.0f} |", flush=True)

        if "stream" in parts:
            print(
                "| records | load_records, MB | then half of them through two workers, MB |\n|---:|---:|---:|",
                flush=True,
            )
            for records in (args.records // 10, args.records):
                many = large(folder / "stream" / str(records), records)
                read, streamed = apart(read_all, many), apart(stream_half, many)
                print(f"| {records} | {read.megabytes:.0f} | {streamed.megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
