"""Small changes of kernel source, one at a time: what `bench.mutate` runs the tests against.

A mutant is an edit of the text at the exact place of one node of the syntax tree: an operator swapped, a number
changed, a statement dropped. The rest of the file, comments and line numbers included, stays as it is. What cannot
change a result is left alone: docstrings, annotations, static asserts, hints to the compiler; so are casts (that an
offset is int64 shows only in tensors of 2**31 elements). `*` becomes `+`, not `/`: a fraction for an offset would
raise an error in any test.
"""

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

OPERATORS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "*", "**": "*", "<<": ">>", ">>": "<<",
    "&": "|", "|": "&", "^": "&", "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&=", "&=": "|=",
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "and": "or", "or": "and",
}  # fmt: skip
FUNCTIONS = {
    "maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "amax": "amin", "amin": "amax",
    "argmax": "argmin", "argmin": "argmax", "sum": "max",
}  # fmt: skip
IDENTITY = {"exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "abs", "floor", "sigmoid"}
LIBRARIES = {"tl", "torch", "math", "libdevice"}
SILENT = {"static_assert", "static_print", "device_assert", "device_print", "debug_barrier", "assume", "print"}
HINTS = {"num_stages", "num_warps", "eviction_policy", "cache_modifier", "volatile", "input_precision"}


class Edit(NamedTuple):
    """Bytes [start, end) of a file give way to `text`."""

    start: int
    end: int
    text: str
    what: str


class Mutant(NamedTuple):
    """One changed file."""

    file: str
    function: str
    lineno: int
    what: str
    line: str  # the changed lines before and after, stripped
    mutated: str
    occurrence: int  # counts mutants of the function that read the same, from 1
    source: str

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What `equivalent_mutants.toml` knows a mutant by: not the line's number, which every edit above moves."""
        return self.file, self.function, self.line, self.mutated, self.occurrence


def make_mutants(file: str, source: str, *, everything: bool = False) -> list[Mutant]:
    """Every mutant of the @jit functions of a file, or of all its functions, in the order of its lines."""
    text = _Text(source)
    mutants, seen, alike = [], {source}, Counter()
    for name, function in _functions(ast.parse(source).body, everything):
        edits = {*_edits(text, function), *_drops(text, _body(function), _arguments(function))}
        for edit in sorted(edits):
            changed = text.edited(edit)
            if changed in seen:
                continue
            seen.add(changed)
            line, mutated = text.lines(edit)
            alike[name, line, mutated] += 1
            lineno = text.data.count(b"\n", 0, edit.start) + 1
            mutants.append(Mutant(file, name, lineno, edit.what, line, mutated, alike[name, line, mutated], changed))
    return mutants


class _Text:
    """Source by byte offsets, which is how the syntax tree counts columns."""

    def __init__(self, source: str):
        self.data = source.encode()
        lines = self.data.splitlines(keepends=True)
        self._starts = [0, *accumulate(map(len, lines))]
        self._tokens, self._comments = [], []
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            row, column = token.start
            start = self._starts[row - 1] + len(lines[row - 1].decode()[:column].encode()) if token.string else 0
            if token.type in (tokenize.OP, tokenize.NAME):
                self._tokens.append((start, token.string))
            elif token.type == tokenize.COMMENT:
                self._comments.append((start, start + len(token.string.encode())))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where the node starts and ends."""
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> str:
        """The node as it is written."""
        start, end = self.span(node)
        return self.data[start:end].decode()

    def tokens_between(self, left: ast.AST, right: ast.AST) -> list[tuple[int, str]]:
        """Operators and words between two nodes; comments are none."""
        return [token for token in self._tokens if self.span(left)[1] <= token[0] < self.span(right)[0]]

    def edited(self, edit: Edit) -> str:
        """The whole source after the edit."""
        return (self.data[: edit.start] + edit.text.encode() + self.data[edit.end :]).decode()

    def lines(self, edit: Edit) -> tuple[str, str]:
        """The lines that the edit touches, before and after, without comments, each stripped and joined by spaces."""
        first = self.data.rfind(b"\n", 0, edit.start) + 1
        last = self.data.find(b"\n", edit.end)
        last = len(self.data) if last < 0 else last
        after = self._code(first, edit.start) + edit.text + self._code(edit.end, last)
        return " ".join(self._code(first, last).split()), " ".join(after.split())

    def _code(self, first: int, last: int) -> str:
        kept = self.data[first:last]
        for start, stop in reversed([c for c in self._comments if first <= c[0] < last]):
            kept = kept[: start - first] + kept[stop - first :]
        return kept.decode()


def _functions(body: list[ast.stmt], everything: bool, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, everything, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (everything or is_kernel(node)):
            yield prefix + node.name, node


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether a decorator is `jit`, `triton.jit` or a call of it."""
    return any(_last_name(getattr(node, "func", node)) == "jit" for node in function.decorator_list)


def _last_name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _root_name(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return _last_name(node)


def _body(function: ast.FunctionDef) -> list[ast.stmt]:
    return function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body


def _arguments(function: ast.FunctionDef) -> set[str]:
    return {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """What of a node is worth a change, below it and itself."""
    match node:
        case ast.FunctionDef():
            children: Iterable[ast.AST] = _body(node)
        case ast.AnnAssign():
            children = [node.value] if node.value else []
        case ast.JoinedStr() | ast.Raise() | ast.Import() | ast.ImportFrom():
            return
        case ast.Call() if _last_name(node.func) in SILENT:
            return
        case ast.Call():
            children = [node.func, *node.args, *(k.value for k in node.keywords if k.arg not in HINTS)]
        case _:
            children = ast.iter_child_nodes(node)
    yield node
    for child in children:
        yield from _running(child)


def _edits(text: _Text, function: ast.FunctionDef) -> Iterator[Edit]:
    """Every edit of an expression."""
    for node in _running(function):
        yield from _operator_edits(text, node)
        if isinstance(node, ast.Constant):
            start, end = text.span(node)
            yield from (Edit(start, end, new, "constant") for new in _other_constants(node.value))
        if isinstance(node, ast.Call):
            yield from _call_edits(text, node)
        if isinstance(node, ast.If | ast.IfExp | ast.While) and not _negated_elsewhere(node.test):
            yield Edit(*text.span(node.test), f"not ({text.of(node.test)})", "condition")


def _operator_edits(text: _Text, node: ast.AST) -> Iterator[Edit]:
    match node:
        case ast.BinOp():
            pairs = [(node.left, node.right)]
        case ast.AugAssign():
            pairs = [(node.target, node.value)]
        case ast.BoolOp():
            pairs = list(pairwise(node.values))
        case ast.Compare():
            pairs = list(pairwise([node.left, *node.comparators]))
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            start = text.span(node)[0]
            yield Edit(start, start + (3 if isinstance(node.op, ast.Not) else 1), "", "sign")
            return
        case _:
            return
    for left, right in pairs:
        for start, token in text.tokens_between(left, right):
            if token in OPERATORS:
                yield Edit(start, start + len(token), OPERATORS[token], "operator")


def _other_constants(value: object) -> list[str]:
    """Numbers near the one given; of a large float (a stand-in for infinity), one that is not large."""
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [str(value + 1)]
    if isinstance(value, float):
        return ["0.0", "2.0"] if value == 1 else [repr(value + 1) if value < 100 else "1.0"]
    return []


def _call_edits(text: _Text, node: ast.Call) -> Iterator[Edit]:
    """Functions swapped or left out, the two values of `where` exchanged, infinity's sign turned."""
    (start, end), name = text.span(node), _last_name(node.func)
    of_library = isinstance(node.func, ast.Attribute) and _root_name(node.func) in LIBRARIES
    bare = isinstance(node.func, ast.Name)
    method = isinstance(node.func, ast.Attribute) and not of_library
    if name in FUNCTIONS and (of_library or (bare and name in ("min", "max")) or (method and name != "sum")):
        stop = text.span(node.func)[1]
        yield Edit(stop - len(name), stop, FUNCTIONS[name], "function")
    if name in IDENTITY and of_library and node.args:
        yield Edit(start, end, f"({text.of(node.args[0])})", "function")
    if name in IDENTITY and method and not node.args:
        yield Edit(start, end, text.of(node.func.value), "function")
    if name == "where" and len(node.args) == 3:
        (first, stop), (begin, last) = text.span(node.args[1]), text.span(node.args[2])
        gap = text.data[stop:begin].decode()
        yield Edit(first, last, text.of(node.args[2]) + gap + text.of(node.args[1]), "where")
    if bare and name == "float" and node.args and isinstance(node.args[0], ast.Constant):
        if node.args[0].value == "nan":
            yield Edit(start, end, "0.0", "constant")
        elif node.args[0].value == "inf" and text.data[start - 1 : start] != b"-":
            yield Edit(start, start, "-", "sign")


def _negated_elsewhere(test: ast.expr) -> bool:
    """Whether another edit already turns this condition round: == into !=, or a `not` dropped."""
    equality = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.NotEq)
    return equality or (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not))


def _drops(text: _Text, body: list[ast.stmt], bound: set[str]) -> Iterator[Edit]:
    """Statements that can go without a NameError; `bound` gains the names that `body` binds for sure."""
    for node in body:
        names = _bound_by(node)
        if isinstance(node, ast.If):
            branches = set(bound), set(bound)
            yield from _drops(text, node.body, branches[0])
            yield from _drops(text, node.orelse, branches[1])
            bound |= branches[0] & branches[1]
        elif any(getattr(node, "body", ())) and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound |= names
            for block in (node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])):
                yield from _drops(text, block, bound)
        elif _droppable(node) and names <= bound:
            yield Edit(*text.span(node), "pass", "dropped")
        bound |= names


def _droppable(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Call() as call):
            return _last_name(call.func) not in SILENT
        case ast.Return() | ast.AnnAssign():
            return node.value is None if isinstance(node, ast.Return) else node.value is not None
    return isinstance(node, ast.Assign | ast.AugAssign | ast.Raise | ast.Break | ast.Continue | ast.Delete)


def _bound_by(node: ast.stmt) -> set[str]:
    """Names that the statement itself binds, not those of the statements in it."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    found = (name for target in targets if target for name in ast.walk(target))
    return {name.id for name in found if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
