"""Which split a patient is in: a function of the patient's name and a seed, whatever else the data set holds."""

import hashlib
import re
from pathlib import Path


def split_of(patient: str, seed: int, val: float, test: float) -> str:
    """`test` for about a fraction `test` of patients, `val` for `val` of them, else `train`.

    The same patient of the same seed is in the same split in every data set, so that sets can be mixed.
    """
    digest = hashlib.sha256(f"{seed} {patient}".encode("utf-8", "surrogatepass")).digest()
    at = int.from_bytes(digest[:7], "big") / 2**56  # 56 bits: exact in a float
    return "test" if at < test else "val" if at < test + val else "train"


def split_of_file(path: Path) -> str:
    """The split that a file is named after: the last of train, val and test in its name.

    Raises:
        ValueError: there is none.
    """
    found = re.findall(r"train|val|test", path.stem)
    if not found:
        raise ValueError(f"{path}: want train, val or test in the file's name for --split files; got {path.name}")
    return found[-1]
