"""Runs a kernel file's tests on changed copies of it, a forked process each: what `bench.mutate` counts with.

The parent imports torch, Triton and pytest once and forks for every mutant. A child finds the changed file in a folder
of its own that takes the place of the package `medground_kernels`, and everything else in one copy of kernels/ and
tests/ made at the start: the repository is only read, and may change meanwhile. No GPU is used (a process that has
started CUDA cannot fork): kernels run under Triton's interpreter.
"""

import ast
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

from bench.mutants import Mutant

MEMORY = 8 << 30  # bytes a child may take beside what the parent has
UNMEASURED = 600  # seconds of processor time that a test file may take where no mutant is in it
OUR_FAULT = 70  # a child's exit status where not the mutant failed but we did


class Task(NamedTuple):
    """A file to be tested, mutated or (None) as it is, and the test files that it has yet to meet."""

    file: str
    mutant: Mutant | None
    tests: tuple[str, ...]


class Result(NamedTuple):
    """How a task ended: killed by a test, a crash ("SIGSEGV") or "time limit", or by nothing ("")."""

    killed_by: str
    seconds: float  # of processor time, which other work on the machine does not stretch
    log: str


class Job(NamedTuple):
    """A running child."""

    task: Task
    folder: Path
    started: float
    spent: float  # by the children before it


class Runner:
    """Runs tasks in forked children, `jobs` at a time, on a copy of the files under `root`."""

    def __init__(self, root: Path, folder: Path, jobs: int, *, shortest_limit: float, torch_too: bool):
        self.folder, self.jobs, self.shortest_limit, self.torch_too = folder, jobs, shortest_limit, torch_too
        self.copy = folder / "copy"
        self.limits: dict[str, float] = {}
        for name in ("kernels", "tests"):
            shutil.copytree(root / name, self.copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        (self.copy / "medground_kernels").symlink_to("kernels")  # for processes that a test starts
        settings = root / "pyproject.toml"
        (self.copy / "pyproject.toml").write_text(settings.read_text() if settings.exists() else "")
        self.sources = {path.stem: path.read_text() for path in sorted((self.copy / "kernels").glob("*.py"))}

    def tests_of(self, file: str) -> tuple[str, ...]:
        """The file's own tests, then those of the files that import it."""
        files = [file]
        for user in files:
            files += [name for name, source in self.sources.items() if name not in files and _imports(source, user)]
        tests = [path for name in files for path in sorted((self.copy / "tests").glob(f"test_{name}.py"))]
        return tuple(path.name for path in tests)

    def measure(self, tests: dict[str, str]) -> None:
        """Run each test file (-> a file that it tests) unmutated; sets how long it may take."""
        with closing(self.run([Task(file, None, (test,)) for test, file in tests.items()])) as results:
            for task, result in results:
                if result.killed_by:
                    raise SystemExit(f"{task.tests[0]} fails without any mutant ({result.killed_by}):\n{result.log}")
                self.limits[task.tests[0]] = max(self.shortest_limit, 2 * result.seconds)

    def run(self, tasks: list[Task]) -> Iterator[tuple[Task, Result]]:
        """Results as they come."""
        waiting, running = deque((task, 0.0) for task in tasks), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    pid, job = self._start(*waiting.popleft())
                    running[pid] = job
                for pid, job in list(running.items()):
                    result = self._ended(pid, job)
                    if result:
                        del running[pid]
                        shutil.rmtree(job.folder, ignore_errors=True)
                        rest = job.task.tests[1:]
                        if rest and not result.killed_by:
                            waiting.appendleft((job.task._replace(tests=rest), result.seconds))
                        else:
                            yield job.task, result
                time.sleep(0.005)
        finally:
            for pid in running:
                _kill(pid)

    def _start(self, task: Task, spent: float) -> tuple[int, Job]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _be_a_child(self, task, folder)
        with suppress(OSError):
            os.setpgid(pid, pid)
        return pid, Job(task, folder, time.monotonic(), spent)

    def _ended(self, pid: int, job: Job) -> Result | None:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        limit = self.limits.get(job.task.tests[0], UNMEASURED)
        waited = time.monotonic() - job.started
        asleep = not done and waited > 30 + 10 * limit  # the limit itself, of processor time, is the system's to keep
        if not done and not asleep:
            return None
        _kill(pid, wait=asleep)
        log, code = (job.folder / "log").read_text(errors="replace")[-8000:], os.waitstatus_to_exitcode(status)
        if code == OUR_FAULT:
            raise SystemExit(f"{job.task.tests[0]} could not be run:\n{log}")
        killer = job.folder / "killer"
        if asleep or code == -signal.SIGXCPU:
            reason = "time limit"
        elif code < 0:
            reason = signal.Signals(-code).name
        elif code:
            reason = killer.read_text() if killer.exists() else f"{job.task.tests[0]}, exit status {code}"
        else:
            reason = ""
        return Result(reason, job.spent + usage.ru_utime + usage.ru_stime, log)


def _imports(source: str, file: str) -> bool:
    name = f"medground_kernels.{file}"
    return any(
        (isinstance(node, ast.ImportFrom) and node.module == name)
        or (isinstance(node, ast.ImportFrom) and node.module == "medground_kernels" and file in _names(node))
        or (isinstance(node, ast.Import) and name in _names(node))
        for node in ast.walk(ast.parse(source))
    )


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names]


def _kill(pid: int, *, wait: bool = True) -> None:
    """End a child and what it started."""
    for kill in (os.killpg, os.kill) if wait else (os.killpg,):
        with suppress(OSError):
            kill(pid, signal.SIGKILL)
    if wait:
        os.waitpid(pid, 0)


class _Listener:
    """A pytest plugin: writes down which test failed; leaves out the plain torch half (fixture `path`)."""

    def __init__(self, folder: Path, torch_too: bool):
        self._folder, self._torch_too = folder, torch_too

    def pytest_collection_modifyitems(self, items):
        if not self._torch_too:
            items[:] = [i for i in items if not hasattr(i, "callspec") or i.callspec.params.get("path") != "torch"]

    def pytest_runtest_logreport(self, report):
        if report.failed:
            (self._folder / "killer").write_text(report.nodeid.removeprefix("tests/"))


def _be_a_child(runner: Runner, task: Task, folder: Path) -> None:
    """Test one changed file, and end the process with pytest's exit status."""
    code = OUR_FAULT
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1), os.dup2(log, 2)
        code = _test(runner, task, folder)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _test(runner: Runner, task: Task, folder: Path) -> int:
    import resource

    import pytest

    package = folder / "medground_kernels"
    package.mkdir()
    (package / f"{task.file}.py").write_text(task.mutant.source if task.mutant else runner.sources[task.file])
    sys.modules["medground_kernels"] = types.ModuleType("medground_kernels")
    sys.modules["medground_kernels"].__path__ = [str(package), str(runner.copy / "kernels")]
    sys.pycache_prefix, sys.dont_write_bytecode = str(runner.folder / "bytecode"), False
    gc.freeze()  # pytest collects garbage several times, which would go through all of torch
    tempfile.tempdir = str(folder)
    os.environ |= {"PYTHONPATH": f"{folder}:{runner.copy}:{os.environ.get('PYTHONPATH', '')}", "TMPDIR": str(folder)}
    os.chdir(runner.copy)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = round(runner.limits.get(task.tests[0], UNMEASURED))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    args = ["-x", "-q", "-c", "pyproject.toml", "-p", "no:cacheprovider", "-p", "no:randomly"]
    args += ["--hypothesis-profile=mutate", f"tests/{task.tests[0]}"]
    code = int(pytest.main(args, plugins=[_Listener(folder, runner.torch_too)]))
    module = sys.modules.get(f"medground_kernels.{task.file}")
    assert module or code, f"tests/{task.tests[0]} does not import medground_kernels.{task.file}"
    assert not module or Path(module.__file__).parent == package, f"{module.__file__} was tested, not the mutant"
    return code


def warm_up(folder: Path) -> None:
    """Import once what every child needs; one thread, since a fork keeps none of the others."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "HYPOTHESIS_STORAGE_DIRECTORY": str(folder)}
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    import hypothesis
    import pytest  # noqa: F401
    import torch
    import triton.experimental.gluon  # the interpreter asks for it at its first launch
    import triton.language  # noqa: F401

    torch.set_num_threads(1)
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    once = {"derandomize": True, "database": None, "deadline": None, "report_multiple_bugs": False}
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # a failure need not be made small
    hypothesis.settings.register_profile("mutate", phases=phases, **once)
