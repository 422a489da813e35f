"""Compare two recorded profiles: what a change did to the step, and where.

    python -m profiles.compare BEFORE AFTER                    tables, as Markdown
    python -m profiles.compare BEFORE AFTER --html FILE        and a page
    python -m profiles.compare BEFORE AFTER --fail-over 5%     exit status 1 where a phase or the step is slower by more

What counts as a change: `profiles.changes`.
"""

import argparse
import sys
from pathlib import Path

from profiles.changes import compare
from profiles.compare_page import render_comparison
from profiles.compare_text import render
from profiles.stored import load


def share(text: str) -> float:
    """5% or 0.05, for argparse."""
    number = text.removesuffix("%")
    try:
        value = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"want a share such as 5% or 0.05; got {text!r}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two recorded profiles.")
    parser.add_argument("before", type=Path, help="folder of a profile, or its profile.json")
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=share, help="changes of time below are noise; 30%% on a CPU, 5%% on a GPU")
    parser.add_argument("--fail-over", type=share, metavar="SHARE", help="exit 1 where anything is slower by more")
    parser.add_argument("--anyway", action="store_true", help="compare other workloads or devices too")
    parser.add_argument("--kernels", type=int, default=10, metavar="N", help="rows of the table of kernels")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page too, which needs nothing else")
    args = parser.parse_args()
    try:
        before, after = load(args.before), load(args.after)
        found = compare(before, after, args.threshold, args.anyway)
    except ValueError as error:
        print(f"profiles.compare: {error}", file=sys.stderr)
        sys.exit(2)
    print(render(found, args.kernels))
    if args.html:
        args.html.write_text(render_comparison(before, after, found))
    sys.exit(args.fail_over is not None and bool(found.slower(args.fail_over)))


if __name__ == "__main__":
    main()
