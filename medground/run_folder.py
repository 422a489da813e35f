"""A run's folder (docs/run_folder.md): who may write there, and what is written as the run goes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from medground import __version__
from medground.config import Config, differing_fields, load_config, save_config


def check_folder(config: Config, data_hash: str) -> None:
    """See whether the run may write to `config.out`.

    Args:
        config: of the run.
        data_hash: SHA-256 of its records.

    Raises:
        ValueError: the folder holds another run or other files; or, to resume, no run, or one of another
            configuration or other records.
    """
    out = Path(config.out)
    saved = out / "config.json"
    if config.resume:
        if not saved.is_file():
            raise ValueError(f"{config.out}: want a run to resume; it has no config.json")
        differing = differing_fields(config, load_config(saved))
        if differing:
            raise ValueError(f"{config.out}: want the configuration it was started with; got {'; '.join(differing)}")
        if json.loads((out / "environment.json").read_text())["data_sha256"] != data_hash:
            raise ValueError(f"{config.data.path}: want the records that {config.out} was started with; they changed")
    elif saved.exists():
        raise ValueError(f"{config.out}: want a folder without a run; it holds one (--resume continues it)")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{config.out}: want a new or an empty folder; it holds other files")


class RunFolder:
    """Writes a run's files; only the first rank has one."""

    def __init__(self, config: Config, environment: dict[str, Any]):
        """Create the folder, or continue in it."""
        self.path = Path(config.out)
        for part in ("samples", "checkpoints", "eval", "tensorboard"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        _write_json(self.path / "environment.json", environment)
        if not config.resume:
            save_config(config, self.path / "config.json")

    def start(self, step: int) -> None:
        """Forget what was logged past `step`, and log on from there."""
        from torch.utils.tensorboard import SummaryWriter  # a second to import, for one rank alone

        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # a line that a crash cut short is past the checkpoint too
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        _write_text(path, "".join(kept))
        self._metrics = path.open("a")
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, metrics: dict[str, float]) -> None:
        """Append a step to metrics.jsonl and TensorBoard."""
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, int(metrics["step"]))
        self._board.flush()

    def log_held_out(self, step: int, metrics: dict[str, Any]) -> None:
        """Append an evaluation's values to TensorBoard."""
        for name, estimate in metrics.items():
            if estimate["value"] is not None:
                self._board.add_scalar(f"held_out/{name}", estimate["value"], step)

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write JSON lines."""
        _write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON value."""
        _write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read what `write_json` wrote; None where it has not yet."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def metrics(self) -> list[dict[str, float]]:
        """Every step logged so far."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def close(self) -> None:
        """Flush TensorBoard."""
        self._metrics.close()
        self._board.close()


def environment(ranks: int, seed: int, data_hash: str, model: str) -> dict[str, Any]:
    """What a result depends on beside its configuration: versions, devices, commit, seed, data."""
    packages = ("transformers", "tokenizers", "safetensors", "numpy", "pillow")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join(sys.argv),
        "commit": _commit(),
        "data_sha256": data_hash,
        "gpus": gpus,
        "machine": f"{len(gpus)} x {gpus[0]}" if gpus else f"{os.cpu_count()}-core CPU",
        "model": model,
        "packages": {"medground": __version__, "torch": torch.__version__} | {name: version(name) for name in packages},
        "python": platform.python_version(),
        "ranks": ranks,
        "seed": seed,
        "system": platform.platform(),
        "threads_per_rank": torch.get_num_threads(),
    }


def _commit() -> str | None:
    source = Path(__file__).resolve().parent.parent
    asked = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # installed without its history


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    os.replace(aside, path)
