"""How much of the time a GPU ran below its clocks, as nvidia-smi tells from beside."""

import subprocess
import tempfile
from types import TracebackType
from typing import IO

import torch

# bits of clocks_event_reasons.active: hardware slowdown, thermal slowdown by software and by hardware, power brake.
# The software's power cap is none of them: a GPU at full load always runs under it
_REASONS = 0x8 | 0x20 | 0x40 | 0x80
_EVERY_MS = 200


class Throttle:
    """Watches the current GPU inside a `with`.

    Attributes:
        share: afterwards, of the looks at the GPU, those that found its clocks held down; None: not known, since there
            is no GPU or nvidia-smi does not tell.
    """

    share: float | None = None

    def __enter__(self) -> "Throttle":
        self._lines = tempfile.TemporaryFile("w+")
        gpu = current_gpu()
        self._watching = _watch(gpu, self._lines) if gpu else None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._watching:
            self._watching.terminate()
            self._watching.wait()
        with self._lines as lines:
            lines.seek(0)
            self.share = share_throttled(lines.read())


def current_gpu() -> str | None:
    """Its name for nvidia-smi, whatever CUDA_VISIBLE_DEVICES numbers it."""
    if not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _watch(gpu: str, lines: IO[str]) -> subprocess.Popen | None:
    query = ("--query-gpu=clocks_event_reasons.active", "--format=csv,noheader", f"--loop-ms={_EVERY_MS}")
    try:
        return subprocess.Popen(["nvidia-smi", f"--id={gpu}", *query], stdout=lines, stderr=subprocess.DEVNULL)
    except OSError:
        return None


def share_throttled(text: str) -> float | None:
    """Of nvidia-smi's lines, each a bit mask such as 0x0000000000000004; None where it gave none."""
    looks = [int(line, 16) for line in text.split() if line.startswith("0x")]
    return sum(bool(mask & _REASONS) for mask in looks) / len(looks) if looks else None
