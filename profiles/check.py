"""Record the tree as it is and compare it with the last record that was kept on this device.

python -m profiles.check                             every workload that has a history
python -m profiles.check tiny-cpu --fail-over 10%    exit status 1 where a phase or the step is slower by more

Status 2, no verdict: nothing to compare with, or a disturbed machine on which something was slower.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.table import device_name
from profiles.changes import Comparison, compare
from profiles.compare import share
from profiles.compare_text import render
from profiles.record import WORKLOADS, record
from profiles.stored import history_path, load_history


def last_kept(names: list[str]) -> dict[str, dict[str, Any]]:
    """The last record of each workload on this device; of no names, of every workload that has one.

    Raises:
        ValueError: there is none, or a history is damaged.
    """
    found = {name: load_history(history_path(name)) for name in names or WORKLOADS}
    missing = [name for name, entries in found.items() if not entries]
    if missing and (names or len(missing) == len(found)):
        raise ValueError(
            f"want a record to compare with; of {', '.join(missing)} none was kept on {device_name()}: "
            "python -m profiles.record WORKLOAD --out DIR --keep"
        )
    return {name: entries[-1] for name, entries in found.items() if entries}


def check(name: str, kept: dict[str, Any]) -> Comparison:
    """Record a workload and compare."""
    with tempfile.TemporaryDirectory() as folder:
        return compare(kept, record(name, Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the tree as it is with the last kept record of this device.")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--fail-over", type=share, default=0.1, metavar="SHARE", help="10%% by default")
    args = parser.parse_args()
    if unknown := set(args.workloads) - set(WORKLOADS):
        parser.error(f"want workloads of {', '.join(WORKLOADS)}; got {', '.join(sorted(unknown))}")
    worse = False
    try:
        for name, kept in last_kept(args.workloads).items():
            found = check(name, kept)
            about = kept["environment"]
            print(f"## {name} since {(about['commit'] or 'unknown')[:10]} of {about['date'][:10]}\n")
            print(render(found) + "\n")
            slower = found.slower(args.fail_over)
            if slower and found.warnings:
                raise ValueError(f"{name}: {', '.join(c.name for c in slower)} slower, but: {' '.join(found.warnings)}")
            worse |= bool(slower)
    except ValueError as error:
        print(f"profiles.check: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(worse)


if __name__ == "__main__":
    main()
