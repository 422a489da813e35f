"""A run's folder (docs/run_folder.md): who may write there, and what is written as the run goes."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from medground import __version__
from medground.config import Config, differing_fields, load_config, save_config

LOCK = ".lock"


def restarted(config: Config) -> bool:
    """Whether torchrun or SLURM started this run again after a failure, so that it goes on by itself."""
    attempts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return any(attempt not in ("", "0") for attempt in attempts) and (Path(config.out) / "config.json").is_file()


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
        started = out / "environment.json"  # missing where the run was stopped before it had written it
        if started.exists() and json.loads(started.read_text())["data_sha256"] != data_hash:
            folders = ", ".join(config.data.path)
            raise ValueError(f"{folders}: want the records that {config.out} was started with; they changed")
    elif saved.exists():
        raise ValueError(f"{config.out}: want a folder without a run; it holds one (--resume continues it)")
    elif out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise ValueError(f"{config.out}: want a new or an empty folder; it holds other files")


def hold(folder: Path) -> TextIO:
    """Take hold of a folder, made where it is missing, for as long as the file that comes back is open.

    Raises:
        ValueError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"{error.filename}: want a folder that can be written; got: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read() or "unknown"
        lock.close()
        raise ValueError(f"{folder}: want a folder that no run writes to; {holder} does") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


class RunFolder:
    """Writes a run's files; only the first rank has one."""

    def __init__(self, config: Config):
        """Take hold of the folder, made where it is missing, for as long as this process lives.

        Raises:
            ValueError: another process holds it, or it cannot be written.
        """
        self.path = Path(config.out)
        try:
            for part in ("samples", "checkpoints", "eval", "skipped", "tensorboard"):
                (self.path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{error.filename}: want a folder that can be written; got: {error.strerror}") from None
        self._lock = hold(self.path)

    def start(self, config: Config, environment: dict[str, Any], step: int) -> None:
        """Write what the run is, forget what was written past `step`, and log on from there."""
        from torch.utils.tensorboard import SummaryWriter  # a second to import, for one rank alone

        if not config.resume:
            save_config(config, self.path / "config.json")
        write_json(self.path / "environment.json", environment)
        for part in ("samples", "eval", "skipped"):
            for file in (self.path / part).glob("step-*"):
                if int(re.match(r"step-(\d+)", file.name)[1]) > step:  # type: ignore[index]
                    file.unlink()
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # a line that a crash cut short is past the checkpoint too
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        _write_text(path, "".join(kept))
        self._metrics = path.open("a")
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def has(self, name: str) -> bool:
        """Whether the folder holds a file."""
        return (self.path / name).exists()

    def log(self, metrics: dict[str, float]) -> None:
        """Append a step to metrics.jsonl and TensorBoard; what is not finite is null there and missing here."""
        finite = _finite(metrics)
        self._metrics.write(json.dumps(finite) + "\n")
        self._metrics.flush()
        os.fsync(self._metrics.fileno())  # before a checkpoint says that the step is done
        for name, value in finite.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, int(metrics["step"]))
        self._board.flush()

    def log_held_out(self, step: int, metrics: dict[str, Any]) -> None:
        """Append an evaluation's values to TensorBoard."""
        for name, estimate in metrics.items():
            if estimate["value"] is not None:
                self._board.add_scalar(f"held_out/{name}", estimate["value"], step)

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write JSON lines; numbers that are not finite become null."""
        write_rows(self.path / name, rows)

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON value."""
        write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read what `write_json` wrote; None where it has not yet."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def metrics(self) -> list[dict[str, float]]:
        """Every step logged so far."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def close(self) -> None:
        """Flush TensorBoard and let go of the folder."""
        if hasattr(self, "_metrics"):
            self._metrics.close()
            self._board.close()
        self._lock.close()


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


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    bad = {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return row | bad


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, all of them or nothing; numbers that are not finite become null."""
    _write_text(path, "".join(json.dumps(_finite(row)) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, all of it or nothing."""
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".partial")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
