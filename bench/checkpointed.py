"""What a checkpoint costs the training loop: steps with one being written, beside steps without.

    python -m bench.checkpointed tiny-cpu --rounds 8

Each round runs two steps of the same work, in turns first and second: one with nothing else to do, one after a state
was copied and while its thread writes, hashes and publishes it. What the loop loses is the time of the copy and what
the second step takes longer.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from bench.step_job import make_job
from bench.step_ours import OurSide
from bench.step_workloads import WORKLOADS, find_workload
from bench.table import environment
from medground.checkpoint import Checkpoints
from medground.sharding import join_ranks


def measure(name: str, rounds: int, folder: Path) -> dict:
    """Seconds of both kinds of steps, of copies and of whole writes, round by round."""
    found: dict[str, list[float]] = {"alone": [], "copy": [], "while writing": [], "written after": []}
    with join_ranks() as ranks, closing(Checkpoints(folder / "checkpoints", ranks, keep=1)) as checkpoints:
        ours = OurSide(make_job(folder, name, find_workload(name)), ranks)
        ours.step()
        checkpoints.save(0, ours.asker.policy, ours.optimizer, {})  # allocates its memory
        checkpoints.wait()
        for number in range(rounds):
            work = ours.steps  # both steps of a round get its lengths of completions
            for kind in ("alone", "while writing") if number % 2 else ("while writing", "alone"):
                ours.steps = work
                start = time.perf_counter()
                if kind == "while writing":
                    checkpoints.save(number + 1, ours.asker.policy, ours.optimizer, {})
                    found["copy"].append(time.perf_counter() - start)
                found[kind].append(ours.step()["step"])
                if kind == "while writing":
                    checkpoints.wait()
                    found["written after"].append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    return {"workload": name, "bytes": size, "seconds": found, "environment": environment()}


def render(result: dict) -> str:
    """The figures in words."""
    seconds = result["seconds"]
    alone, slower, copy = (seconds[name] for name in ("alone", "while writing", "copy"))
    shares = [(c + s - a) / a for a, s, c in zip(alone, slower, copy, strict=True)]
    stall, written = median(copy), median(seconds["written after"])
    share = median(c / a for c, a in zip(copy, alone, strict=True))
    return (
        f"{result['bytes'] / 1e6:.0f} MB; a step alone takes {median(alone):.3g} s.\n"
        f"A checkpoint holds the loop up for {1000 * stall:.3g} ms, {share:.2%} of a step, and is on the disk after "
        f"{written:.3g} s.\n"
        f"With what the step beside it takes longer it costs {median(shares):.1%} of a step ({min(shares):.1%} to "
        f"{max(shares):.1%}); one in 50 steps, {median(shares) / 50:.2%}."
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs the loop.")
    parser.add_argument("workload", choices=tuple(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: want 1 or more; got {args.rounds}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(args.workload, args.rounds, Path(folder))
    except ValueError as error:
        sys.exit(f"bench.checkpointed: {error}")
    print(render(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
