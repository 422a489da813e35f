"""Options that converters share."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What every converter is asked for."""

    out: str
    """Folder to write records.jsonl, images/ and manifest.json into; must not hold another data set."""
    workers: int = 0
    """Processes that convert; 0 for one a CPU. The files do not depend on it."""
    leave_out_faulty: bool = False
    """Leave out rows with a fault, listed in left_out.jsonl, instead of stopping at them."""

    def __post_init__(self) -> None:
        want(bool(self.out), "out", "a folder name", self.out)
        want(self.workers >= 0, "workers", ">= 0", self.workers)

    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {k: v for k, v in asdict(self).items() if k not in ("out", "workers", "leave_out_faulty")}


@dataclass(frozen=True, kw_only=True)
class DrawnConfig(PrepareConfig):
    """A converter that draws splits by patient."""

    seed: int = 0
    """Seed of the splits, where they are drawn: a patient's depends on it and the patient alone."""
    val: float = 0.1
    """Fraction of patients in the split `val`, where splits are drawn."""
    test: float = 0.2
    """Fraction of patients in the split `test`, where splits are drawn; the rest is `train`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fractions = self.val, self.test
        want(min(fractions) >= 0 and sum(fractions) < 1, "val, test", "fractions whose sum is below 1", fractions)


def want(condition: bool, name: str, wanted: str, got: object) -> None:
    """Raises ValueError unless `condition`: "name: want wanted; got got"."""
    if not condition:
        raise ValueError(f"{name}: want {wanted}; got {got!r}")
