"""The import rule (docs/design.md): who may import whom. The checker first, then the project, then fake trees."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]

TREES = {"medground": "medground", "kernels": "medground_kernels", "bench": "bench", "profiles": "profiles"}
"""Folder -> the name its files are imported by."""

PROGRAMS = ("cli", "train", "demo", "plan", "__main__")
"""Rooms of medground/ that may import everything, and that nothing but a program may import."""

WIRED = (
    "build", "evaluate", "preflight", "loading", "summary", "predict", "base_model", "base_answers", "audit",
    "show_prompt", "encoder_tools", "resampling", "controls", "evaluate_model",
)  # fmt: skip
"""Rooms that put stages together: they may import every stage and each other; a stage may not import them."""

SHARED = ("medground.config", "medground.records", "medground.packing", "medground_kernels")
"""What every stage may import. Under `if TYPE_CHECKING:` it may also name another stage's types, which runs nothing."""

KERNELS_MAY_IMPORT = {"torch", "triton", "medground_kernels", *sys.stdlib_module_names}

EXCEPTIONS = {
    ("report", "medground.datasets.images"): "the page shows films as the model's loader reads them",
    ("report", "medground.datasets.folders"): "and finds them where it does",
    ("report", "medground.datasets.inventory"): "and says which ones they are",
    ("report", "medground.weight_files"): "controls that were asked later are shown where they are of the run's export",
    ("policy", "medground.lora"): "a policy may have adapters; lora is a leaf: torch, peft and names of weights",
    ("sharding", "medground.lora"): "what decodes has adapters merged",
    ("sharding", "medground.job.store"): "where ranks meet; a leaf",
    ("sharding", "medground.job.watch"): "ranks say what they do; a leaf",
    ("checkpoint", "medground.checkpoint_folder"): "its files, without torch; a leaf",
    ("checkpoint", "medground.adamw"): "it holds the optimizer's state; adamw is a leaf: torch, torchao",
    ("export", "medground.lora"): "adapters are exported",
    ("eval_folder", "medground.run_folder"): "it is held and written as a run's is",
    ("scoring", "medground.set_iou"): "metrics are means of it; it is a leaf: numpy and the type of a box",
    ("scoring", "medground.datasets.faults"): "files of predictions are checked as data sets are; a leaf",
    ("scoring", "medground.datasets.json_items"): "and read; a leaf: json and faults",
    ("scoring", "medground.datasets.inventory"): "exports appear whole; a leaf: files and records",
    ("varlen_attention", "flash_attn"): "the fastest attention; imported on CUDA, where it is installed",
}
"""(room, module) -> why that one import is right."""


class Import(NamedTuple):
    """One imported module, as resolved."""

    importer: str
    module: str
    where: str  # file:line
    guard: str  # what it stands under: 'TYPE_CHECKING' runs never, '__name__' only as the main program, else ''

    def __str__(self) -> str:
        return f"{self.where} imports {self.module}"


def find_offenders(root: Path) -> list[str]:
    """Every breach of the import rule under `root`, one line each: 'file:line imports module: rule'."""
    modules = _modules(root)
    imports = [found for name, path in modules.items() for found in _imports(root, path, name, modules)]
    offenders = []
    if (root / "kernels/__init__.py").exists():
        offenders.append("kernels/__init__.py exists: it would hide Hugging Face's package `kernels`")
    offenders += [f"{found}: {rule}" for found in imports for rule in _broken_rules(found)]
    return offenders + _circles(imports, modules)


def _modules(root: Path) -> dict[str, Path]:
    modules = {}
    for folder, package in TREES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _imports(root: Path, path: Path, importer: str, modules: dict[str, Path]) -> Iterator[Import]:
    package = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]
    tree = ast.parse(path.read_text(), str(path))
    guards = {}
    for branch in (node for node in ast.walk(tree) if isinstance(node, ast.If)):
        test = branch.test.left if isinstance(branch.test, ast.Compare) else branch.test
        if _last_name(test) in ("TYPE_CHECKING", "__name__"):
            guards |= {node: _last_name(test) for statement in branch.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        for module in dict.fromkeys(_targets(node, package, modules)):
            yield Import(importer, module, f"{path.relative_to(root)}:{node.lineno}", guards.get(node, ""))


def _targets(node: ast.AST, package: list[str], modules: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:  # `from medground import config` imports a module, `from x import f` a name
            submodule = f"{base}.{alias.name}"
            yield submodule if submodule in modules or base in ("medground", "medground_kernels") else base
    elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
        yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def _last_name(expression: ast.expr) -> str:
    """`f` and `module.f` -> 'f'."""
    return getattr(expression, "attr", getattr(expression, "id", ""))


def _inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _room(module: str) -> str:
    """'medground.datasets.images' -> 'datasets'; '' for the package itself and for names of its __init__."""
    return module.split(".")[1] if "." in module else ""


def _broken_rules(found: Import) -> Iterator[str]:
    importer, module = found.importer, found.module
    if _inside(module, "kernels"):
        yield "that is Hugging Face's package; ours is medground_kernels"
    for tool in ("bench", "profiles"):
        # profiles record the steps that bench sets up
        if _inside(module, tool) and not _inside(importer, tool) and not _inside(importer, "profiles"):
            yield f"nobody imports {tool}"
    stranger = module.split(".")[0] not in KERNELS_MAY_IMPORT and (_room(importer), module) not in EXCEPTIONS
    if _inside(importer, "medground_kernels") and stranger:
        yield "kernels/ imports torch and triton only"
    if _inside(importer, "medground") and _inside(module, "medground") and not _may_import(found):
        yield f"{_room(importer) or 'medground'} may import only {', '.join(SHARED)} and its own folder"


def _may_import(found: Import) -> bool:
    module, ours, theirs = found.module, _room(found.importer), _room(found.module)
    if ours in PROGRAMS or module == "medground.__version__" or (ours and ours == theirs):
        return True
    if ours in WIRED:
        return theirs not in PROGRAMS
    if theirs in (*PROGRAMS, *WIRED):
        return False
    if (ours, module) in EXCEPTIONS:
        return True
    # the package, config and records are below the stages: they know none of them
    return ours not in ("", "config") and (
        _inside(module, *SHARED) or (found.guard == "TYPE_CHECKING" and ours != "records")
    )


def _circles(imports: list[Import], modules: dict[str, Path]) -> list[str]:
    """One line for each import that closes a circle, found by a depth-first walk."""
    edges: dict[str, list[Import]] = {name: [] for name in modules}
    for found in imports:
        if found.module in modules and found.guard != "__name__":  # the main program is imported by nobody
            edges[found.importer].append(found)
    circles, done = [], set()

    def walk(name: str, trail: list[str]) -> None:
        for found in edges[name]:
            if found.module in trail:
                circle = [*trail[trail.index(found.module) :], found.module]
                circles.append(f"{found}: a circle, {' -> '.join(circle)}")
            elif found.module not in done:
                walk(found.module, [*trail, found.module])
        done.add(name)

    for name in modules:
        if name not in done:
            walk(name, [name])
    return circles


def test_this_repository_keeps_the_import_rule():
    offenders = find_offenders(REPOSITORY)
    assert not offenders, "\n" + "\n".join(offenders)


def test_the_files_are_found_under_their_imported_names():
    assert {"medground.config", "medground.rewards.spatial", "medground_kernels.grpo_loss"} <= _modules(
        REPOSITORY
    ).keys()


def test_every_exception_is_still_needed():
    modules = _modules(REPOSITORY)
    used = {(_room(i.importer), i.module) for n, p in modules.items() for i in _imports(REPOSITORY, p, n, modules)}
    assert not EXCEPTIONS.keys() - used


@pytest.fixture
def tree(tmp_path):
    """A function that writes {path: source} over a small tree that keeps the rule, and returns the offenders."""

    def write(files: dict[str, str]) -> list[str]:
        sound = {
            "medground/__init__.py": '__version__ = "1"\n',
            "medground/config.py": "import json\n",
            "medground/records.py": "import torch\n",
            "medground/rollout.py": "from medground.records import Group\nfrom medground_kernels.ops import f\n"
            "if TYPE_CHECKING:\n    from medground.datasets import read, Film\n",
            "medground/datasets/__init__.py": "from medground.datasets.images import read\n",
            "medground/datasets/images.py": "from medground import __version__\n",
            "medground/train.py": "from medground import evaluate, rollout\nfrom medground.datasets import read\n"
            'if __name__ == "__main__":\n    import medground.cli\n',
            "medground/cli.py": "import medground.train\n",
            "medground/summary.py": "from medground.evaluate import f\n",
            "medground/evaluate.py": "import medground.rollout\nfrom medground.config import Config\n",
            "medground/report/page.py": "from medground.datasets.images import read\nfrom . import style\n",
            "medground/report/style.py": "",
            "kernels/ops.py": "import math\nimport torch\n",
            "kernels/more.py": "from medground_kernels.ops import f\n",
            "bench/ops.py": "from medground_kernels.ops import f\nimport medground.rollout\n",
            "profiles/ops.py": "import bench.ops\n",
        }
        for path, source in (sound | files).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        return find_offenders(tmp_path)

    return write


def test_a_sound_tree_has_no_offenders(tree):
    assert tree({}) == []


BREACHES = {
    "kernels import medground": ("kernels/ops.py", "import medground.records", "torch and triton only"),
    "kernels import a third package": ("kernels/ops.py", "import numpy", "torch and triton only"),
    "kernels import one that another file may": ("kernels/ops.py", "import flash_attn", "torch and triton only"),
    "kernels import Hugging Face's": ("medground/rollout.py", "import kernels", "ours is medground_kernels"),
    "kernels by their folder": ("bench/ops.py", "from kernels.ops import f", "ours is medground_kernels"),
    "a stage imports bench": ("medground/rollout.py", "import bench.ops", "nobody imports bench"),
    "a program imports profiles": ("medground/train.py", "from profiles import ops", "nobody imports profiles"),
    "bench imports profiles": ("bench/ops.py", "import profiles.ops", "nobody imports profiles"),
    "a stage imports a stage": ("medground/rollout.py", "from medground.datasets import read", "rollout may import"),
    "a stage imports a stage's file": ("medground/rollout.py", "import medground.datasets.images", "rollout may"),
    "a stage from the package": ("medground/rollout.py", "from medground import datasets", "rollout may"),
    "a stage relatively": ("medground/datasets/images.py", "from ..rollout import f", "datasets may"),
    "a stage, package relatively": ("medground/datasets/images.py", "from .. import rollout", "datasets may"),
    "a stage by name": ("medground/rollout.py", "importlib.import_module('medground.datasets')", "rollout may"),
    "inside a function": ("medground/rollout.py", "def f():\n    import medground.datasets", "rollout may"),
    "what is wired imports a program": ("medground/evaluate.py", "import medground.train", "evaluate may"),
    "a stage imports what is wired": ("medground/rollout.py", "import medground.evaluate", "rollout may"),
    "an excepted room goes further": ("medground/report/page.py", "import medground.datasets", "report may"),
    "a stage names a program's type": (
        "medground/rollout.py",
        "if TYPE_CHECKING:\n    import medground.cli",
        "rollout may",
    ),
    "records name a stage's type": (
        "medground/records.py",
        "if TYPE_CHECKING:\n    import medground.rollout",
        "records may",
    ),
    "otherwise is no type": (
        "medground/rollout.py",
        "if not TYPE_CHECKING:\n    import medground.datasets",
        "rollout may",
    ),
    "records import a stage": ("medground/records.py", "import medground.rollout", "records may"),
    "config imports records": ("medground/config.py", "import medground.records", "config may"),
    "the package imports a stage": ("medground/__init__.py", "from medground import config", "medground may"),
}


@pytest.mark.parametrize("path, line, rule", BREACHES.values(), ids=BREACHES)
def test_each_breach_is_reported_with_its_place(tree, path, line, rule):
    offenders = tree({path: f'"""A file."""\n\n{line}\n'})
    place = f"{path}:{3 + line.count(chr(10))} imports "
    assert len([o for o in offenders if o.startswith(place) and rule in o]) == 1, offenders


def test_kernels_must_not_be_a_package(tree):
    assert any(o.startswith("kernels/__init__.py exists") for o in tree({"kernels/__init__.py": ""}))


def test_a_circle_between_allowed_imports_is_reported(tree):
    (offender,) = tree(
        {
            "medground/datasets/images.py": "from medground.datasets.manifest import check\n",
            "medground/datasets/manifest.py": "\n\nfrom .images import read\n",
        }
    )
    assert offender == (
        "medground/datasets/manifest.py:3 imports medground.datasets.images: a circle, "
        "medground.datasets.images -> medground.datasets.manifest -> medground.datasets.images"
    )


def test_a_circle_of_programs_is_reported(tree):
    (offender,) = tree({"medground/train.py": "def f():\n    import medground.cli\n"})
    assert "a circle, medground.cli -> medground.train -> medground.cli" in offender


def test_a_circle_of_kernels_is_reported(tree):
    (offender,) = tree({"kernels/ops.py": "import medground_kernels.more\n"})
    assert "a circle, medground_kernels.ops -> medground_kernels.more -> medground_kernels.ops" in offender
