"""Faults of a data set, each with its place, what was wanted and what came; all are collected before anyone is told."""

SHOWN = 20  # printed; the rest are counted


class Faults:
    """Collects complaints, "place: field: want ...; got ..."."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, where: str, field: str, wanted: str, got: object) -> None:
        """Note a fault at `where`: file:line, or file and what in it."""
        self.lines.append(complaint(where, field, wanted, got))

    def say(self, line: str) -> None:
        """Note a fault in words of its own."""
        self.lines.append(line)

    def __len__(self) -> int:
        return len(self.lines)

    def raise_if_any(self, of: object, hint: str) -> None:
        """Raises ValueError with the first 20 faults and the number of all; `of` and `hint` head the list."""
        if not self.lines:
            return
        count = len(self.lines)
        shown = self.lines[:SHOWN]
        if count > SHOWN:
            shown.append(f"and {count - SHOWN} more")
        raise ValueError("\n".join([f"{of}: {count} fault{'s' * (count > 1)} ({hint})", *shown]))


def complaint(where: str, field: str, wanted: str, got: object) -> str:
    """One fault as text; a long value is cut."""
    text = repr(got)
    text = text if len(text) <= 120 else text[:117] + "..."
    return f"{where}: {field}: want {wanted}; got {text}"
