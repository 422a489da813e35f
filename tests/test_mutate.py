"""The mutation tester: which changes it makes, and that it tells a killed mutant from a survivor."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.mutant_runner import Result
from bench.mutants import make_mutants
from bench.mutate import out_of_date, rate, read_equivalents, summarise

REPOSITORY = Path(__file__).parents[1]
KERNELS = sorted(path.stem for path in (REPOSITORY / "kernels").glob("*.py"))

HEAD = '''"""A file - with 1 + 1 in its docstring."""


@triton.jit(repr="a + b")
def kernel(x_ptr, n: tl.constexpr = 4 * 2):
    """What it does: 1 + 1."""
'''


def changes(body, **options):
    """(line before, line after) of every mutant of a kernel with this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return [(m.line, m.mutated) for m in make_mutants("made_up", HEAD + lines, **options)]


@pytest.mark.parametrize(
    ("line", "mutated"),
    [
        ("return x + y", ["return x - y"]),
        ("return (x) * (y)  # x + y", ["return (x) + (y)"]),
        ("return x // y", ["return x * y"]),
        ("return x & ~y", ["return x | ~y", "return x & y"]),
        ("return x and y or z", ["return x or y or z", "return x and y and z"]),
        ("return x < y == z", ["return x <= y == z", "return x < y != z"]),
        ("return x[:, None]", []),
        ("return -x", ["return x"]),
        ("return 'a', True", ["return 'a', False"]),
        ("return 7", ["return 8"]),
        ("return 1.0", ["return 0.0", "return 2.0"]),
        ("return 0.5", ["return 1.5"]),
        ("return -1e4", ["return 1e4", "return -1.0"]),
        ('return -float("inf")', ['return float("inf")']),
        ('return float("inf")', ['return -float("inf")']),
        ('return float("nan")', ["return 0.0"]),
        ("return tl.maximum(x, y)", ["return tl.minimum(x, y)"]),
        ("return tl.sum(x, axis)", ["return tl.max(x, axis)"]),
        ("return tl.exp(x)", ["return (x)"]),
        ("return x.exp()", ["return x"]),
        ("return tl.where(c, (x), y)", ["return tl.where(c, (y), x)"]),
        ("return x if c else y", ["return x if not (c) else y"]),
        ("return x.to(tl.float32)", []),
        ("return tl.load(x_ptr, eviction_policy=1, other=1)", ["return tl.load(x_ptr, eviction_policy=1, other=2)"]),
        ("tl.static_assert(1 + 1 < 3)", []),
        ("tl.store(x_ptr, n)", ["pass"]),
        ('x = "é" + y', ['x = "é" - y']),
        ('return f"{x + 1}"', []),
        ("if x == y: return", ["if x != y: return", "if x == y: pass"]),
        ("if not x: return", ["if x: return", "if not x: pass"]),
    ],
)
def test_each_change(line, mutated):
    before = line.partition("  #")[0]
    assert sorted(changes(line)) == sorted((before, " ".join(after.split())) for after in mutated)


def dropped(body):
    return [line for line, mutated in changes(body) if mutated.endswith("pass")]


def test_a_statement_is_dropped_where_its_names_are_bound_already():
    assert dropped("x = a\nx = b\ny, x = c\nn = x\nn[0] = x\nx += c") == ["x = b", "n = x", "n[0] = x", "x += c"]


def test_what_one_branch_binds_is_not_bound_after_it():
    assert dropped("if c:\n    x = a\nelse:\n    x = b\nx = d") == ["x = d"]
    assert dropped("if c:\n    x = a\nx = d") == []


def test_what_a_loop_binds_stays_bound():
    assert dropped("for i in a:\n    x = i\n    x = b\nx = d") == ["x = b", "x = d"]


def test_places_are_those_of_the_node():
    source = HEAD + "    x = n  # é + 1\n    tl.store(\n        x_ptr,  # where + to\n        x + n,\n    )\n"
    add, drop = sorted(make_mutants("made_up", source), key=lambda m: m.what, reverse=True)
    assert (add.function, add.lineno, add.line, add.mutated) == ("kernel", 10, "x + n,", "x - n,")
    assert add.source == source.replace("x + n", "x - n")
    assert (drop.lineno, drop.line, drop.mutated) == (8, "tl.store( x_ptr, x + n, )", "pass")
    assert drop.source == HEAD + "    x = n  # é + 1\n    pass\n"


def test_the_same_change_twice_is_numbered():
    source = HEAD + "    x = 1\n" + "    y = x\n    x = y\n" * 2
    assert [m.occurrence for m in make_mutants("made_up", source) if m.line == "x = y"] == [1, 2]
    assert len({m.key for m in make_mutants("made_up", source)}) == len(make_mutants("made_up", source))


def test_plain_functions_only_when_asked():
    source = "def f(x):\n    return x + 1\n\nclass C:\n    def g(self):\n        return -1\n"
    assert make_mutants("made_up", source) == []
    assert {m.function for m in make_mutants("made_up", source, everything=True)} == {"f", "C.g"}


@pytest.mark.parametrize("file", KERNELS)
def test_every_mutant_of_a_real_kernel_parses_and_differs(file):
    source = (REPOSITORY / f"kernels/{file}.py").read_text()
    mutants = make_mutants(file, source)
    for mutant in mutants:
        ast.parse(mutant.source)
    assert len({source, *(m.source for m in mutants)}) - 1 == len({m.key for m in mutants}) == len(mutants)


def test_every_listed_equivalent_is_a_mutant():
    listed = read_equivalents(REPOSITORY / "bench/equivalent_mutants.toml")
    sources = {file: (REPOSITORY / f"kernels/{file}.py").read_text() for file in KERNELS}
    assert out_of_date(listed, sources, KERNELS, []) == []


def test_the_list_is_out_of_date_where_a_test_kills():
    source = HEAD + "    return 1 + n\n"
    first, second = make_mutants("made_up", source)
    results = [(first, Result("test_a", 1.0, "")), (second, Result("", 2.0, ""))]
    listed = {first.key: "no", second.key: "yes", ("made_up", "kernel", "gone", "gone", 1): "was"}
    faults = out_of_date(listed, {"made_up": source}, ["made_up"], results)
    assert [("killed by test_a" in fault, "is no mutant" in fault) for fault in faults] == [
        (True, False),
        (False, True),
    ]
    row = summarise(results, {second.key: "yes"})["all"]
    assert row == {"mutants": 2, "killed": 1, "survived": 0, "equivalent": 1, "seconds": 3.0}
    assert rate(row) == 1.0 and rate(summarise(results, {})["made_up"]) == 0.5


KERNEL = "def jit(f):\n    return f\n\n@jit\ndef add(x, y):\n    return x + y\n"
TREE = {
    "kernels/tested.py": KERNEL,
    "tests/test_tested.py": "from medground_kernels.tested import add\n\ndef test():\n    assert add(2, 3) == 5\n",
    "kernels/untested.py": KERNEL,
    "tests/test_untested.py": "import medground_kernels.untested\n\ndef test():\n    pass\n",
    "kernels/below.py": KERNEL,
    "tests/test_below.py": "import medground_kernels.below\n\ndef test():\n    pass\n",
    "kernels/above.py": "from medground_kernels.below import add\n",
    "tests/test_above.py": "from medground_kernels.above import add\n\ndef test():\n    assert add(2, 3) == 5\n",
    "kernels/endless.py": KERNEL.replace("return x + y", "while x:\n        x -= y\n    return x"),
    "tests/test_endless.py": "from medground_kernels.endless import add\n\ndef test():\n    assert add(2, 1) == 0\n",
}


@pytest.fixture
def tree(tmp_path):
    """A small repository."""
    for path, source in TREE.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    return tmp_path


def mutate(tree, *args):
    command = [sys.executable, "-m", "bench.mutate", "--root", tree, "--jobs", "2", *args]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_a_wrong_kernel_is_killed_and_an_idle_test_found_out(tree):
    pytest.importorskip("triton")
    done = mutate(tree, "--limit", "1", "--json", tree / "out.json")
    assert done.returncode == 1, done.stderr
    found = {(m["file"], m["mutated"]): m["killed_by"] for m in json.loads((tree / "out.json").read_text())["mutants"]}
    assert found == {
        ("tested", "return x - y"): "test_tested.py::test",
        ("untested", "return x - y"): "",
        ("below", "return x - y"): "test_above.py::test",
        ("endless", "while not (x):"): "test_endless.py::test",
        ("endless", "x += y"): "time limit",
        ("endless", "pass"): "time limit",
    }
    assert "Survived: kernels/untested.py:6 add\n  - return x + y\n  + return x - y\n" in done.stdout
    assert "| all | 6 | 5 | 1 | 0 |" in done.stdout
    assert {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()} == {*TREE, "out.json"}


def test_tests_that_fail_anyway_are_named(tree):
    pytest.importorskip("triton")
    (tree / "tests/test_tested.py").write_text("import medground_kernels.tested\n\ndef test():\n    assert False\n")
    done = mutate(tree, "tested")
    assert done.returncode == 1 and "test_tested.py fails without any mutant" in done.stderr
