"""Seconds and memory of scoring a file of predictions: `python -m bench.scored`.

A made-up file in the form of docs/run_folder.md, some 250 bytes a line, 3 records a patient, a fifth of them with
two boxes; `medground score` reads and scores it in a process of its own.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = ((1_000, 10_000), (1_000_000, 1_000))
"""Predictions, resamples."""
CATEGORIES = ("atelectasis", "cardiomegaly", "consolidation", "edema", "effusion", "mass", "nodule", "pneumothorax")


def write_predictions(path: Path, count: int, per_patient: int = 3) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            category = CATEGORIES[rng.randrange(8)]
            truth = [_box(rng) for _ in range(1 + (i % 5 == 0))] if i % 20 else []
            boxes = [[round(v + rng.uniform(-40, 40), 1) for v in box] for box in truth]
            row = {
                "id": f"record-{i:07d}", "image": f"images/{i // per_patient}.png", "width": 1024, "height": 1024,
                "phrase": f"{('left', 'right', 'small')[i % 3]} {category}", "category": category,
                "patient": f"patient-{i // per_patient}", "truth": truth,
                "boxes": None if rng.random() < 0.02 else boxes, "completion": "", "logp": -1.5,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


def measure(path: Path, resamples: int) -> dict[str, float]:
    """Seconds, and peak resident memory in GB, of `medground score` on the file."""
    words = [sys.executable, "-m", "medground", "score", str(path), "--json", "--resamples", str(resamples)]
    start = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(words)}: exit status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "gigabytes": usage.ru_maxrss / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of `medground score` on made-up predictions.")
    parser.add_argument("--count", type=int, help="predictions; without it, the two cases of the log")
    parser.add_argument("--resamples", type=int, default=1_000)
    parser.add_argument("--per-patient", type=int, default=3, help="records a patient")
    args = parser.parse_args()
    for count, resamples in [(args.count, args.resamples)] if args.count else CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "predictions.jsonl"
            write_predictions(path, count, args.per_patient)
            size = path.stat().st_size
            found = measure(path, resamples)
        print(
            f"{count:,} predictions ({size / count:.0f} bytes each), {resamples:,} resamples: {found['seconds']:.1f} s "
            f"({found['cpu']:.1f} s of CPU), peak {found['gigabytes']:.2f} GB",
            flush=True,
        )


def _box(rng: random.Random) -> list[float]:
    x, y = rng.uniform(0, 700), rng.uniform(0, 700)
    return [round(v, 1) for v in (x, y, x + rng.uniform(20, 300), y + rng.uniform(20, 300))]


if __name__ == "__main__":
    main()
