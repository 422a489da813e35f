"""The demo on several seeds of films and training, as one Markdown table.

    python -m bench.demo_seeds 11 12 13

One base model serves all seeds. The README's table comes from here.
"""

import argparse
import json
from pathlib import Path

from medground.demo import DemoConfig, run_demo

COLUMNS = {
    "mIoU before": "miou_before",
    "mIoU after": "miou_after",
    "after, shuffled images": "miou_after_shuffled_images",
    "blind baseline": "miou_blind_baseline",
    "Acc@0.5 before": "acc50_before",
    "Acc@0.5 after": "acc50_after",
    "right side before": "side_before",
    "right side after": "side_after",
}


def main() -> None:
    """Run the demo for each seed that has no summary yet, and print the table."""
    parser = argparse.ArgumentParser(description="The demo on several seeds, as a Markdown table.")
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-seeds"))
    args = parser.parse_args()
    summaries = []
    for seed in args.seeds:
        folder = args.out / str(seed)
        if not (folder / "summary.json").exists():
            run_demo(DemoConfig(out=str(folder), seed=seed, base=str(args.out / "base")))
        summaries.append(json.loads((folder / "summary.json").read_text()))
    print("\n| seed | " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * (len(COLUMNS) + 1))
    for seed, summary in zip(args.seeds, summaries, strict=True):
        print(f"| {seed} | " + " | ".join(f"{summary[key]:.3f}" for key in COLUMNS.values()) + " |")
    machines = {f"{s['machine']}, {s['steps']} steps, {s['records_test']} held-out records" for s in summaries}
    print("\n" + "; ".join(sorted(machines)))


if __name__ == "__main__":
    main()
