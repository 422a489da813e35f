"""CSV files as they come: marks, line ends, quotes, damage; every fault has its file, line and column."""

import gzip

import pytest

from medground.datasets.faults import Faults
from medground.datasets.tables import has_column, read_table

COLUMNS = ("image", "phrase", "x")


def read(tmp_path, data, name="a.csv"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_table(path, COLUMNS))


def test_plain_rows_and_their_lines(tmp_path):
    rows = read(tmp_path, 'image,x,phrase,more\na.png,1, left ,m\n\n"b.png",2,"one, ""two""\nthree",\nc.png,3,d,e\n')
    assert [(row.where.rsplit(":", 1)[1], row["image"], row["phrase"], row.get("more")) for row in rows] == [
        ("2", "a.png", "left", "m"),
        ("4", "b.png", 'one, "two"\nthree', ""),
        ("6", "c.png", "d", "e"),
    ]
    assert rows[0].where.startswith(str(tmp_path / "a.csv")) and rows[0].get("nothing") == ""


@pytest.mark.parametrize("text", [
    "\ufeffimage,phrase,x\na,b,1\n", "image,phrase,x\r\na,b,1\r\n", "\ufeffimage,phrase,x\r\na,b,1",
    " image , phrase,x\na,b,1",
    "image,phrase,x,,,\na,b,1,,,\n", "image,phrase,x,,,\na,b,1,,,,,\n", '"image","phrase","x"\n"a","b","1"\n',
])  # fmt: skip
def test_marks_line_ends_and_empty_columns(tmp_path, text):
    (row,) = read(tmp_path, text)
    assert row.cells == {"image": "a", "phrase": "b", "x": "1"}
    assert has_column(tmp_path / "a.csv", "phrase") and not has_column(tmp_path / "a.csv", "split")


def test_gzip(tmp_path):
    (row,) = read(tmp_path, gzip.compress(b"image,phrase,x\na,b,1\n"), "a.csv.gz")
    assert row["phrase"] == "b"


BROKEN = {
    "empty": ("", r"a\.csv:1: header: want columns image, phrase, x; got an empty file"),
    "a column missing": (
        "image,x\na,1\n",
        r"a\.csv:1: header: want columns image, phrase, x; got image, x \(missing: phr",
    ),
    "semicolons": ("image;phrase;x\na;b;1\n", r"a\.csv:1: header: .*\(missing: image, phrase, x\)"),
    "a column twice": ("image,phrase,x,x\na,b,1,2\n", r"a\.csv:1: header: want each column once; got x several times"),
    "a short row": ("image,phrase,x\na,b,1\nc,d\n", r"a\.csv:3: line: want 3 cells, as the header has; got 2"),
    "a long row": ("image,phrase,x\na,b,1,2\n", r"a\.csv:2: line: want 3 cells, as the header has; got 4"),
    "an open quote": ('image,phrase,x\na,"b,1\nc,d,2\n', r"a\.csv:\d: line: want CSV; got unexpected end of data"),
    "text after a quote": ('image,phrase,x\na,"b"c,1\n', r"a\.csv:2: line: want CSV; got"),
    "not UTF-8": (b"image,phrase,x\na,b,1\nc,\xe9panchement,2\n", r"a\.csv:3: line: want UTF-8; got b'\\xe9panc"),
    "UTF-16": ("image,phrase,x\na,b,1\n".encode("utf-16"), r"a\.csv:1: line: want UTF-8"),
    "a cell without end": (
        b"image,phrase,x\na," + b"b" * (1 << 21) + b",1\n",
        r"a\.csv:2: line: want CSV; got field larger",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_named_with_its_line(tmp_path, case):
    data, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        read(tmp_path, data)


def test_no_file_and_a_damaged_archive(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        list(read_table(tmp_path / "none.csv", COLUMNS))
    with pytest.raises(ValueError, match=r"a\.csv\.gz:1: line: want a file that can be read"):
        read(tmp_path, b"no gzip", "a.csv.gz")
    whole = gzip.compress(b"image,phrase,x\n" + b"a,b,1\n" * 1000)
    with pytest.raises(ValueError, match=r"a\.csv\.gz:\d+: line: want a file that can be read"):
        read(tmp_path, whole[:-12], "a.csv.gz")


@pytest.mark.parametrize("cell", ["", "abc", "NaN", "inf", "-inf", "1e400", "1,5", "0x10", "--1", "1e12"])
def test_what_is_no_number_is_named(tmp_path, cell):
    (row,) = read(tmp_path, f'image,phrase,x\na,b,"{cell}"\n')
    faults = Faults()
    assert row.number("x", faults) is None
    assert faults.lines == [f"{tmp_path}/a.csv:2: x: want a finite number; got {cell!r}"]


@pytest.mark.parametrize("cell", ["0", "-3", "1.5", "NaN"])
def test_what_is_no_size_is_named(tmp_path, cell):
    (row,) = read(tmp_path, f"image,phrase,x\na,b,{cell}\n")
    faults = Faults()
    assert row.pixels("x", faults) is None and len(faults) == 1
    assert faults.lines[0].startswith(f"{tmp_path}/a.csv:2: x: want a ")


def test_numbers(tmp_path):
    (row,) = read(tmp_path, "image,phrase,x\na,b, 12.0 \n")
    faults = Faults()
    assert row.number("x", faults) == 12.0 and row.pixels("x", faults) == 12 and not faults
    assert row.text("phrase", faults) == "b" and not faults
