"""Names of files in a data set stay inside their folder, links followed."""

import os
import re
from pathlib import Path

_DRIVE = re.compile(r"[A-Za-z]:|[\\/]")  # as POSIX or Windows begins an absolute path


def fault_of_path(root: Path, name: str, folder: str) -> str:
    """What is wrong with `name` as a file under `root`; "" for nothing.

    Strings, not Paths: a data set of 100,000 images asks this of each.

    Args:
        root: resolved.
        name: relative to it.
        folder: what `root` is, for the text.

    Returns:
        What would be wanted instead, as "a path without '..'".
    """
    if _DRIVE.match(name):
        return f"a path relative to {folder}"
    if ".." in re.split(r"[\\/]", name):
        return "a path without '..'"
    try:
        target = os.path.realpath(os.path.join(root, name))
        if not target.startswith(os.path.join(root, "")):
            return f"a file inside {folder} (a link leads to {target})" if target != str(root) else "an existing file"
        if not os.path.isfile(target):
            return "an existing file"
    except (OSError, ValueError) as error:
        return f"a file name ({error})"
    return ""


def need_folder(path: Path, option: str) -> Path:
    """The folder, resolved; raises ValueError naming the option where there is none."""
    if not path.is_dir():
        raise ValueError(f"{option}: want a folder; got {path}, which is none")
    return path.resolve()
