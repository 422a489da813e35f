"""torchao for tests: `make .path/torchao-0.18.0` puts it there; from .venv transformers would import it every time."""

import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".path" / "torchao-0.18.0"


def has_torchao() -> bool:
    """Whether torchao can be imported."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return find_spec("torchao") is not None
