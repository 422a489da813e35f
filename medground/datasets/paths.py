"""Names of files in a data set stay inside their folder, links followed."""

import os
import re
import stat
from pathlib import Path

_DRIVE = re.compile(r"[A-Za-z]:|[\\/]")  # as POSIX or Windows begins an absolute path


def fault_of_path(root: Path, name: str, folder: str, known: dict[str, str] | None = None) -> str:
    """What is wrong with `name` as a file under `root`; "" for nothing.

    Strings, not Paths: a data set of 100,000 images asks this of each.

    Args:
        root: resolved.
        name: relative to it.
        folder: what `root` is, for the text.
        known: what folders of names seen before are, links followed; kept by whoever asks often.

    Returns:
        What would be wanted instead, as "a path without '..'".
    """
    if _DRIVE.match(name):
        return f"a path relative to {folder}"
    if ".." in re.split(r"[\\/]", name):
        return "a path without '..'"
    try:
        if known is not None and _is_plain(root, name, known):
            return ""
        target = os.path.realpath(os.path.join(root, name))
        if not target.startswith(os.path.join(root, "")):
            return f"a file inside {folder} (a link leads to {target})" if target != str(root) else "an existing file"
        if not os.path.isfile(target):
            return "an existing file"
    except (OSError, ValueError) as error:
        return f"a file name ({error})"
    return ""


def _is_plain(root: Path, name: str, known: dict[str, str]) -> bool:
    """Whether it is a file, not a link, in a folder that lies under `root` when its links are followed."""
    place, own = os.path.split(name)
    if place not in known:
        known[place] = os.path.join(os.path.realpath(os.path.join(root, place)), "")
    if not own or own == "." or not known[place].startswith(os.path.join(root, "")):
        return False
    try:
        return stat.S_ISREG(os.lstat(known[place] + own).st_mode)
    except OSError:
        return False


def need_folder(path: Path, option: str) -> Path:
    """The folder, resolved; raises ValueError naming the option where there is none."""
    if not path.is_dir():
        raise ValueError(f"{option}: want a folder; got {path}, which is none")
    return path.resolve()
