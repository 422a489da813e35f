"""Prompts from a thread and from workers: the same bits in the same order; what happens when something breaks."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from medground.config import AugmentConfig
from medground.data_order import DataOrder
from medground.datasets.manifest import load_records
from medground.loading import Loader, PromptMaker, Question, WorkerDiedError, check_shared_memory, prompts_of_steps
from medground.prompts import load_processor
from medground.records import Prompt


@pytest.fixture(scope="module")
def make(phantoms: Path, base_folder: Path) -> PromptMaker:
    return PromptMaker((str(phantoms),), load_processor(base_folder, 56 * 56, 112 * 112), "brief")


@pytest.fixture(scope="module")
def questions(phantoms: Path) -> list[Question]:
    """Twelve records, the last one with the first one's image."""
    examples = load_records(phantoms)[:12]
    return [*map(Question, examples[:11]), Question(examples[11], examples[0].image)]


@pytest.fixture(scope="module")
def two(make: PromptMaker) -> Iterator[Loader]:
    """A loader with two workers."""
    with closing(Loader(make, workers=2, ahead=5)) as loader:
        yield loader


def assert_same(ours: list[Prompt], theirs: list[Prompt]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for field in fields(Prompt):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(y, torch.Tensor):
                assert x.dtype == y.dtype and torch.equal(x, y), field.name
            else:
                assert x == y, field.name


def test_workers_change_no_bit(make: PromptMaker, questions: list[Question], two: Loader):
    want = [make(question) for question in questions]
    assert want[11].image_keys == want[0].image_keys != want[1].image_keys
    assert_same(list(Loader(make, workers=0, ahead=3)(questions)), want)
    before = torch.get_rng_state()
    assert_same(list(two(questions)), want)
    processes = {process.pid for process in multiprocessing.active_children()}
    assert_same(list(two(questions[::-1])), want[::-1])
    assert {process.pid for process in multiprocessing.active_children()} == processes and len(processes) == 2
    assert torch.equal(torch.get_rng_state(), before)
    with closing(Loader(make, workers=1, ahead=1)) as one:
        assert_same(list(one(iter(questions[:3]))), want[:3])
    assert list(two([])) == list(Loader(make, workers=0, ahead=3)([])) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_may_be_left(workers: int, make: PromptMaker, questions: list[Question], two: Loader):
    load = two if workers else Loader(make, workers=0, ahead=5)
    left = load(questions)
    next(left)
    left.close()
    assert [prompt.example.id for prompt in load(questions[3:7])] == [q.example.id for q in questions[3:7]]


@pytest.mark.parametrize("workers", [0, 2])
def test_only_so_many_questions_are_taken_ahead(workers: int, make, questions: list[Question], two: Loader):
    taken = []
    load = two if workers else Loader(make, workers=0, ahead=5)
    with closing(load(taken.append(q) or q for q in questions * 3)) as prompts:
        for count in range(1, 5):
            next(prompts)
            assert count < len(taken) <= count + 6


def test_another_stream_does_not_end_the_first_in_silence(questions: list[Question], two: Loader):
    first = two(questions)
    next(first)
    two(questions)
    with pytest.raises(AssertionError, match="another stream"):
        next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_with_its_record(workers: int, make, questions, two: Loader, tmp_path: Path):
    bad = tmp_path / "bad.png"
    data = (Path(make.folders[0]) / questions[4].example.image).read_bytes()
    bad.write_bytes(data[: len(data) // 2])
    asked = [*questions[:4], replace(questions[4], image=str(bad)), *questions[5:]]
    prompts = (two if workers else Loader(make, workers=0, ahead=5))(asked)
    for question in questions[:4]:
        assert next(prompts).example == question.example
    with pytest.raises(ValueError) as error:
        next(prompts)
    assert str(error.value).startswith(f"record {questions[4].example.id}: {bad}: cannot read the image: ")
    assert "Traceback" not in str(error.value) and "worker process" not in str(error.value)


def test_workers_are_deaf_to_a_schedulers_signals(questions: list[Question], two: Loader):
    prompts = two(questions)
    next(prompts)
    for process in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process.pid, number)
    assert len(list(prompts)) == 11


def test_a_killed_worker_is_told(make: PromptMaker, questions: list[Question], two: Loader, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    prompts = two(questions * 20)
    next(prompts)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=r"^data.workers: want processes that stay alive"):
        list(prompts)
    assert len(list(two(questions))) == 12, "the loader starts others"


def test_ranks_and_resumption_change_no_step(make: PromptMaker, phantoms: Path, tiny_job, tmp_path: Path):
    config, order = tiny_job(tmp_path, steps=6), DataOrder([load_records(phantoms)[:9]], seed=5)

    def steps(rank: int, size: int, first: int) -> list[list[str]]:
        load = Loader(make, workers=0, ahead=4)
        ranks = SimpleNamespace(rank=rank, size=size)
        return [[p.example.id for p in some] for some in prompts_of_steps(load, order, config, ranks, first)]

    whole = steps(0, 1, 0)
    assert [name for step in whole for name in step] == [order[p].id for p in range(24)]
    assert [a + b for a, b in zip(steps(0, 2, 0), steps(1, 2, 0), strict=True)] == whole
    assert steps(0, 1, 4) == whole[4:] and steps(0, 1, 6) == []


def test_only_what_is_trained_on_is_augmented(
    make: PromptMaker, questions: list[Question], two: Loader, tmp_path: Path
):
    some = replace(make, augment=AugmentConfig(flip=0.5, shift=0.1, intensity=0.1), seed=3)
    plain, trained = questions[0], [replace(questions[0], position=p) for p in range(6)]
    assert_same([some(plain)], [make(plain)])
    found = [some(question) for question in trained]
    assert len({prompt.image_keys for prompt in found}) == 6, "each position has a change of its own"
    assert {p.example.id for p in found} == {plain.example.id} and len({p.example.boxes for p in found}) > 3
    with closing(Loader(some, workers=1, ahead=2)) as loader:
        assert_same(list(loader(trained)), found)
    assert_same([make(question) for question in trained], [make(plain)] * 6)


KILLED = """
import multiprocessing, os, signal, sys
from multiprocessing import forkserver
from pathlib import Path
from medground.datasets.manifest import load_records
from medground.loading import Loader, PromptMaker, Question
from medground.prompts import load_processor

folder = Path(sys.argv[1])
make = PromptMaker((str(folder),), load_processor(Path(sys.argv[2]), 3136, 12544), "brief")
load = Loader(make, workers=2, ahead=4)
prompts = load(map(Question, load_records(folder)))
next(prompts)
pids = [forkserver._forkserver._forkserver_pid, *(p.pid for p in multiprocessing.active_children())]
print(*pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_was_killed(phantoms: Path, base_folder: Path, tmp_path: Path):
    (tmp_path / "job.py").write_text(KILLED)
    words = [sys.executable, str(tmp_path / "job.py"), str(phantoms), str(base_folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 3
    for _ in range(200):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert [pid for pid in pids if alive(pid)] == []


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_shared_memory_that_is_too_small(tmp_path: Path, monkeypatch):
    import medground.loading

    free = SimpleNamespace(free=100e6)
    monkeypatch.setattr(medground.loading.shutil, "disk_usage", lambda place: free)
    # 8 of the step, 2 workers with 4 of the next and 4 of an evaluation each: 24 of 100 tokens of 18,816 bytes
    check_shared_memory(2, 8, 100, 2, tmp_path)
    with pytest.raises(ValueError, match=r"data.workers: want 135 MB free in .* of 3 ranks on this host; got 100 MB"):
        check_shared_memory(2, 8, 100, 3, tmp_path)
    check_shared_memory(0, 8, 100, 3, tmp_path)
    check_shared_memory(2, 8, 100, 3, tmp_path / "none")
