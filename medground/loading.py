"""Prompts ahead of the step that wants them: images read, resized and tokenised in worker processes, or in a thread.

The order is the asker's: workers change when a prompt is made, never which one or a bit of it. Workers come from a fork
server, which imports torch and transformers once a rank and has no part of the main process, so no CUDA context. The
patches of an image, nearly all of a prompt, come through shared memory, the rest through a pipe.
"""

from __future__ import annotations

import atexit
import shutil
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from medground.augmentation import augment, mirrored, swap_sides
from medground.config import AugmentConfig, Config
from medground.data_order import DataOrder
from medground.datasets.folders import image_path
from medground.datasets.images import read_image
from medground.datasets.workers import begin_worker
from medground.prompts import Processor, make_prompt
from medground.records import Example, Prompt

if TYPE_CHECKING:
    from medground.sharding import Ranks  # a worker need not import it

Change = Literal["", "blank", "flipped"]

GREY = (128, 128, 128)
"""Of a blank image."""

AHEAD = 8
"""Prompts made ahead of an evaluation."""

_TOKEN_BYTES = 4 * 1176 * 4  # of an image's token: four patches of 2 x 14 x 14 pixels in colour, float32
_INLINE = ("input_ids", "position_ids", "image_grid_thw")  # small: a shared tensor takes an open file of its own


class WorkerDiedError(RuntimeError):
    """A process that made prompts is gone."""


@dataclass(frozen=True)
class Question:
    """An example to ask about.

    Attributes:
        example: the record.
        image: to show in place of its own one; "" for its own.
        position: in the training order, for what is trained on; -1 for what is not, and never augmented.
        change: of the image, for a control (controls.py); "flipped" is mirrored, with the phrase's sides swapped where
            that is safe, "blank" grey all over, "" as it is.
    """

    example: Example
    image: str = ""
    position: int = -1
    change: Change = ""


@dataclass(frozen=True)
class PromptMaker:
    """Question -> Prompt; workers get a copy.

    Attributes:
        folders: of the data; images are relative to them (`image_path`).
        processor: of the model that is asked.
        template: a key of prompts.TEMPLATES.
        augment: of what is trained on.
        seed: of the run.
    """

    folders: tuple[str, ...]
    processor: Processor
    template: str
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0

    def __call__(self, question: Question) -> Prompt:
        """Read the image and ask.

        Raises:
            ValueError: the image cannot be read; names the record and the file.
        """
        example = question.example
        if question.change == "blank":
            return make_prompt(
                example, Image.new("RGB", (example.width, example.height), GREY), self.processor, self.template
            )
        try:
            image = read_image(image_path(self.folders, question.image or example.image))
        except ValueError as error:
            raise ValueError(f"record {example.id}: {error}") from None
        if question.position >= 0 and self.augment != AugmentConfig():
            example, image = augment(example, image, self.augment, self.seed, question.position)
        if question.change == "flipped":
            example, image = mirrored(example, image, swap_sides(example.phrase) or example.phrase)
        return make_prompt(example, image, self.processor, self.template)


class Loader:
    """Prompts of a stream of questions, in their order, some of them made before they are asked for."""

    def __init__(self, make: PromptMaker, *, workers: int, ahead: int):
        """Begin what workers come from, but none of them.

        Args:
            make: what makes a prompt.
            workers: processes; they start with the first stream and stay. 0 for a thread of this process.
            ahead: prompts that may be ready or under way; with workers, at least two of each.
        """
        self.make = make
        self._workers, self._ahead = workers, ahead
        self._questions = _Questions()
        self._processes: DataLoader[Any] | None = None
        self._coming: Iterator[Any] = iter(())
        self._stream = 0
        if workers:
            _start_fork_server()  # it imports for some seconds, in which a model may be loaded

    def __call__(self, questions: Iterable[Question]) -> Generator[Prompt]:
        """One prompt for each question; workers begin at once.

        With workers, a stream that is begun ends the one before, and so does `close`.

        Raises:
            ValueError: an image cannot be read; names the record. Where its turn comes, not before.
            WorkerDiedError: a worker was killed.
        """
        if not self._workers:
            return _in_a_thread(self.make, questions, self._ahead)
        self._questions.asked = questions
        if self._processes is None:
            self._processes = self._start()
        with _shielded(), _nameless():
            self._coming = iter(self._processes)
        atexit.register(self.close)  # workers are deaf to what Python else ends them with
        self._stream += 1
        return self._received(self._stream)

    def close(self) -> None:
        """End the workers, and with them the stream; the next one would start others."""
        self._processes, self._coming, self._stream = None, iter(()), self._stream + 1
        atexit.unregister(self.close)

    def _start(self) -> DataLoader[Any]:
        return DataLoader(
            _Prompts(self.make),
            sampler=self._questions,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            prefetch_factor=_each(self._ahead, self._workers),
            persistent_workers=True,
            multiprocessing_context="forkserver",
            worker_init_fn=_begin,
            generator=torch.Generator(),  # or a stream would draw a number from the global one
        )

    def _received(self, stream: int) -> Generator[Prompt]:
        while True:
            assert stream == self._stream, "another stream ended this one"
            try:
                prompt = next(self._coming)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:  # the latter while it hands over what it made
                if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
                    raise
                self.close()
                raise WorkerDiedError(
                    f"data.workers: want processes that stay alive; one was killed (memory, /dev/shm full?): {error}"
                ) from error
            if isinstance(prompt, ValueError):
                raise prompt
            yield replace(prompt, **{name: torch.from_numpy(getattr(prompt, name)) for name in _INLINE})


def check_shared_memory(
    workers: int, ahead: int, prompt_tokens: int, ranks: int, place: Path = Path("/dev/shm")
) -> None:
    """See that what the workers of a host hand over has room: where shared memory is full, they die without a word.

    Args:
        workers: of a rank, for training and as many for evaluations.
        ahead: prompts of a rank's step; as many again are made meanwhile.
        prompt_tokens: of the longest prompt, at most four patches each.
        ranks: on this host.
        place: where shared memory is, if the system has it as a folder.

    Raises:
        ValueError: there is not enough.
    """
    if not workers or not place.is_dir():
        return
    prompts = ahead + sum(workers * _each(count, workers) for count in (ahead, AHEAD))
    wanted, free = ranks * prompts * prompt_tokens * _TOKEN_BYTES / 1e6, shutil.disk_usage(place).free / 1e6
    if free < wanted:
        raise ValueError(
            f"data.workers: want {wanted:.0f} MB free in {place} for images of {ranks} ranks on this host; got "
            f"{free:.0f} MB: give the container more (--shm-size), or set data.workers to 0"
        )


def prompts_of_steps(
    load: Loader, order: DataOrder, config: Config, ranks: Ranks, first: int
) -> Iterator[list[Prompt]]:
    """This rank's prompts of each step from `first` on: a slice of each step's positions in the order."""
    B = config.rollout.prompts_per_step
    mine = B // ranks.size
    starts = (step * B + ranks.rank * mine for step in range(first, config.steps))
    prompts = load(Question(order[p], position=p) for start in starts for p in range(start, start + mine))
    return (list(islice(prompts, mine)) for _ in range(first, config.steps))


def _each(ahead: int, workers: int) -> int:
    """Prompts of each worker that may be ready or under way."""
    return max(2, -(-ahead // workers))


def _in_a_thread(make: PromptMaker, questions: Iterable[Question], ahead: int) -> Generator[Prompt]:
    coming = iter(questions)
    with ThreadPoolExecutor(1) as maker:
        waiting: deque[Future[Prompt]] = deque(maker.submit(make, question) for question in islice(coming, ahead))
        try:
            while waiting:
                prompt = waiting.popleft().result()
                waiting.extend(maker.submit(make, question) for question in islice(coming, 1))
                yield prompt
        finally:
            for future in waiting:
                future.cancel()


class _Questions(Sampler[Question]):
    """What the DataLoader takes its "indices" from: the stream of the moment."""

    def __init__(self) -> None:
        self.asked: Iterable[Question] = ()

    def __iter__(self) -> Iterator[Question]:
        return iter(self.asked)


class _Prompts(Dataset[Any]):
    """In a worker: a prompt for a question, or the ValueError that it gave, which else would lose its text."""

    def __init__(self, make: PromptMaker):
        self._make = make

    def __getitem__(self, question: Question) -> Any:
        try:
            prompt = self._make(question)
        except ValueError as error:
            return error
        return replace(prompt, **{name: getattr(prompt, name).numpy() for name in _INLINE})


def _as_it_is(prompt: Any) -> Any:
    return prompt


def _begin(worker: int) -> None:
    begin_worker()


def _start_fork_server() -> None:
    forkserver.set_forkserver_preload([__name__])
    with _shielded():
        resource_tracker.ensure_running()  # which unblocks two of the signals
    with _shielded():
        forkserver.ensure_running()


@contextmanager
def _shielded() -> Iterator[None]:
    """Processes started here are deaf to signals that schedulers send to all of a job: the run decides when it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _nameless() -> Iterator[None]:
    """Processes started here do not run the main program's module again, of which workers need nothing."""
    main = sys.modules["__main__"]
    names: tuple[str, ...] = ("__spec__", "__file__")
    kept = {name: vars(main).pop(name) for name in names if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(kept)
