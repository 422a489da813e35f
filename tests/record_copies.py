"""Record copies of the tree, all at once: python tests/record_copies.py FOLDER..., each of which gets record/ and told.

What does not belong to the tree is imported once, and processes forked from there.
"""

import os
import runpy
import sys
from pathlib import Path


def record(folder: Path) -> None:
    """What `python -m profiles.record test` does in a copy."""
    os.chdir(folder)
    with open("told", "w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    ours = ("medground", "medground_kernels", "bench", "profiles")
    assert not any(name.split(".")[0] in ours for name in sys.modules)
    sys.path[0:1] = [str(folder), str(folder / ".path")]
    sys.argv[1:] = ["test", "--out", "record", "--steps", "3"]
    runpy.run_module("profiles.record", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    children = {}
    for name in sys.argv[1:]:
        pid = os.fork()
        if not pid:
            record(Path(name))
            sys.exit()
        children[pid] = name
    failed = [name for pid, name in children.items() if os.waitpid(pid, 0)[1]]
    sys.exit(f"failed: {' '.join(failed)}" if failed else 0)
