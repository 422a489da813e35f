"""What an audit found, and its summary in a few lines."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medground.audit.suspicions import Suspicion
from medground.records import Example


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        folder: of the data set.
        errors: each with its place; training refuses the data set, or would fail at the image.
        warnings: suspicions.
        counts: as `inventory.Counts.as_json`.
        blind: `scoring.blind_baseline` of train on test; None without the two.
        manifest: manifest.json; None without one.
        examples: records without a fault and with a readable image.
    """

    folder: Path
    errors: list[str]
    warnings: list[Suspicion]
    counts: dict[str, Any]
    blind: dict[str, Any] | None
    manifest: dict[str, Any] | None
    examples: list[Example]

    def as_json(self) -> dict[str, Any]:
        """The object of the JSON file."""
        return {
            "folder": str(self.folder),
            "errors": self.errors,
            "warnings": [warning.as_json() for warning in self.warnings],
            "warning_counts": dict(Counter(warning.kind for warning in self.warnings)),
            "counts": self.counts,
            "blind": self.blind,
            "source": (self.manifest or {}).get("source"),
            "licence": (self.manifest or {}).get("licence"),
        }


def summary(audit: Audit) -> str:
    """The audit in a few lines."""
    lines = [f"{audit.folder}: {len(audit.errors)} errors, {len(audit.warnings)} warnings"]
    for kind, count in sorted(Counter(warning.kind for warning in audit.warnings).items()):
        first = next(warning for warning in audit.warnings if warning.kind == kind)
        lines.append(f"  {kind}: {count} (first: {first.where}: {first.text})")
    for split, numbers in audit.counts.items():
        lines.append(
            f"  {split}: {numbers['records']} records, {numbers['boxes']} boxes, {numbers['images']} images, "
            f"{numbers['patients']} patients"
        )
    if audit.blind:
        metrics = audit.blind["metrics"]
        told = ", ".join(f"{name} {_figure(metrics[name])}" for name in ("miou", "acc@0.5"))
        lines.append(f"  without looking (best constant box per phrase, or per category and side), on test: {told}")
    return "\n".join(lines)


def _figure(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "none"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
