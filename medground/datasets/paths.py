"""Names of files in a data set stay inside their folder, links followed."""

from pathlib import Path, PurePosixPath, PureWindowsPath


def fault_of_path(root: Path, name: str, folder: str) -> str:
    """What is wrong with `name` as a file under `root`; "" for nothing.

    Args:
        root: resolved.
        name: relative to it.
        folder: what `root` is, for the text.

    Returns:
        What would be wanted instead, as "a path without '..'".
    """
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        return f"a path relative to {folder}"
    if ".." in PurePosixPath(name).parts or ".." in PureWindowsPath(name).parts:
        return "a path without '..'"
    try:
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            return f"a file inside {folder} (a link leads to {target})"
        if not target.is_file():
            return "an existing file"
    except (OSError, ValueError, RuntimeError) as error:
        return f"a file name ({error})"
    return ""
