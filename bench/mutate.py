"""Do the tests notice a wrong kernel? Each line is changed in small ways; the changes that no test kills are listed.

    python -m bench.mutate                          # the Triton kernels of every file: its @jit functions
    python -m bench.mutate token_logprob --all      # every function of one file

A mutant (bench/mutants.py) is killed when tests/test_<file>.py fails, crashes or runs too long; one that survives
also meets the tests of the kernel files that import this one (bench/mutant_runner.py). Survivors that no test can kill
stand in bench/equivalent_mutants.toml, one [[mutant]] each: `file`, `function`, `line` and `mutated` as printed here,
`why`, and `occurrence` (from 1) where a function has the same change more than once.

Exits with 1 if under 95 % of the mutants that are not equivalent are killed, or if that list is out of date.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import tomllib
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path

from bench.mutant_runner import Result, Runner, Task, warm_up
from bench.mutants import Mutant, make_mutants

ROOT = Path(__file__).parents[1]
WANTED = 0.95

Results = list[tuple[Mutant, Result]]
Equivalents = dict[tuple, str]  # Mutant.key -> why no test can kill it


def read_equivalents(path: Path) -> Equivalents:
    """The list of survivors that are none, if the file exists."""
    entries = tomllib.loads(path.read_text()).get("mutant", []) if path.exists() else []
    return {(e["file"], e["function"], e["line"], e["mutated"], e.get("occurrence", 1)): e["why"] for e in entries}


def out_of_date(equivalents: Equivalents, sources: dict[str, str], picked: list[str], results: Results) -> list[str]:
    """Entries of the list that match no mutant, or one that a test kills."""
    killed = {mutant.key: result.killed_by for mutant, result in results if result.killed_by}
    listed = {key[0] for key in equivalents}.intersection(picked)
    every = {mutant.key for file in listed for mutant in make_mutants(file, sources[file], everything=True)}
    faults = []
    for key in equivalents:
        if key in killed:
            faults.append(f"{key} is killed by {killed[key]}")
        elif key[0] not in sources or (key[0] in picked and key not in every):
            faults.append(f"{key} is no mutant")
    return faults


def test_mutants(runner: Runner, mutants: list[Mutant], equivalents: Equivalents) -> Results:
    """Test each mutant, with a progress bar; first the tests themselves."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would not survive a fork
    tests = {file: runner.tests_of(file) for file in dict.fromkeys(m.file for m in mutants)}
    missing = [file for file, found in tests.items() if not found]
    if missing:
        raise SystemExit(f"want tests/test_<file>.py for {', '.join(missing)}, or for a file that imports it")
    runner.measure({test: file for file, found in reversed(tests.items()) for test in reversed(found)})
    results, count = [], Counter()
    # one that is listed is only seen to survive its own tests
    jobs = runner.run([Task(m.file, m, tests[m.file][: 1 if m.key in equivalents else None]) for m in mutants])
    with closing(jobs), tqdm(total=len(mutants), unit="mutant") as bar:
        for task, result in jobs:
            results.append((task.mutant, result))
            count[bool(result.killed_by)] += 1
            bar.set_postfix(killed=count[True], survived=count[False], refresh=False)
            bar.update()
    order = {mutant: number for number, mutant in enumerate(mutants)}
    return sorted(results, key=lambda pair: order[pair[0]])


def summarise(results: Results, equivalents: Equivalents) -> dict[str, dict[str, float]]:
    """Counts and seconds for each file, and for "all"."""
    rows: dict[str, Counter] = defaultdict(Counter)
    for mutant, result in results:
        survived = not result.killed_by
        equivalent = survived and mutant.key in equivalents
        for row in (rows[mutant.file], rows["all"]):
            row.update(mutants=1, killed=not survived, survived=survived and not equivalent, equivalent=equivalent)
            row["seconds"] += result.seconds
    return {name: rows[name] for name in sorted(rows, key=lambda name: (name == "all", name))}


def rate(row: dict[str, float]) -> float:
    """Killed of those that could be."""
    possible = row["mutants"] - row["equivalent"]
    return row["killed"] / possible if possible else 1.0


def print_report(results: Results, equivalents: Equivalents) -> None:
    """Survivors, then a table with a row for each file."""
    survivors = [mutant for mutant, result in results if not result.killed_by]
    for known, title in ((True, "Equivalent"), (False, "Survived")):
        for mutant in (m for m in survivors if (m.key in equivalents) == known):
            number = f", occurrence {mutant.occurrence}" if mutant.occurrence > 1 else ""
            print(f"{title}: kernels/{mutant.file}.py:{mutant.lineno} {mutant.function}{number}")
            print(f"  - {mutant.line}\n  + {mutant.mutated}")
            if known:
                print(f"  why: {equivalents[mutant.key]}")
    columns = ("mutants", "killed", "survived", "equivalent", "seconds")
    print("\n| file | " + " | ".join(columns) + " | killed of all | of those that differ |")
    print("|" + "---|" * (len(columns) + 3))
    for name, row in summarise(results, equivalents).items():
        figures = [f"{row[column]:.0f}" for column in columns]
        shares = [f"{share:.1%}" for share in (row["killed"] / row["mutants"], rate(row))]
        print("| " + " | ".join([name, *figures, *shares]) + " |")


def write_json(path: Path, results: Results, equivalents: Equivalents) -> None:
    """The whole outcome, one record for each mutant."""
    records = []
    for mutant, result in results:
        record = mutant._asdict() | {"killed_by": result.killed_by, "seconds": round(result.seconds, 2)}
        del record["source"]
        if not result.killed_by and mutant.key in equivalents:
            record["equivalent"] = equivalents[mutant.key]
        records.append(record)
    path.write_text(json.dumps({"files": summarise(results, equivalents), "mutants": records}, indent=1) + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Changes kernels in small ways and counts what the tests notice.")
    parser.add_argument("files", nargs="*", help="kernel files, as token_logprob; none: all")
    parser.add_argument("--all", action="store_true", help="every function, not the Triton kernels alone")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome of every mutant")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    help_limit = "processor time in seconds that any test file may take; above it, twice what it takes unmutated"
    parser.add_argument("--limit", type=float, default=10, metavar="S", help=help_limit)
    parser.add_argument("--root", type=Path, default=ROOT, help="where kernels/, tests/ and bench/ lie")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the mutants, test them, report."""
    args = parse_args(argv)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children and folders go
    equivalents = read_equivalents(args.root / "bench/equivalent_mutants.toml")
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        runner = Runner(args.root, Path(folder), args.jobs, shortest_limit=args.limit, torch_too=args.all)
        unknown = set(args.files) - set(runner.sources)
        if unknown:
            raise SystemExit(f"want some of {', '.join(runner.sources)}; got {', '.join(sorted(unknown))}")
        picked = args.files or [file for file in runner.sources if file != "backend"]  # which every test goes through
        mutants = [m for file in picked for m in make_mutants(file, runner.sources[file], everything=args.all)]
        if args.sample:
            drawn = random.Random(args.seed).sample(range(len(mutants)), min(args.sample, len(mutants)))
            mutants = [mutants[i] for i in sorted(drawn)]
        if not mutants:
            raise SystemExit(f"no @jit function in {', '.join(picked)}: nothing to change (--all: other functions too)")
        warm_up(Path(folder))
        results = test_mutants(runner, mutants, equivalents)
        faults = out_of_date(equivalents, runner.sources, picked, results)
    print_report(results, equivalents)
    if args.json:
        write_json(args.json, results, equivalents)
    for fault in faults:
        print(f"equivalent_mutants.toml is out of date: {fault}")
    return int(bool(faults) or rate(summarise(results, equivalents)["all"]) < WANTED)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
