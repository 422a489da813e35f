"""`medground eval`: a model folder's answers to the records of a split, metrics, controls.

    torchrun --nproc-per-node 2 -m medground eval --model DIR --data DIR --controls shuffled whole

    records -> pieces -> questions -> prompts -> answers -> parts/ -> predictions, metrics

Each rank holds the whole model and asks about pieces of its own. A piece goes through the engine by itself, so that its
bits depend on nothing but the piece: not on the number of ranks, nor on where an evaluation was stopped.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from medground import eval_folder
from medground.asking import Asking, asking_for
from medground.build import build_whole
from medground.controls import ASKED, CONSTANT, Asked, agreement, constant_answers, questions
from medground.datasets.folders import folders_hash, load_folders
from medground.datasets.manifest import select
from medground.eval_config import EvalConfig
from medground.eval_folder import Part, Piece
from medground.eval_table import table
from medground.evaluate import predictions_of
from medground.job.memory import memory_explained
from medground.job.watch import watch
from medground.loading import AHEAD, Loader, PromptMaker, Question, check_shared_memory
from medground.policy import check_model
from medground.preflight import longest_prompt, model_folder_of, with_swapped_sides
from medground.prompts import Processor, load_processor
from medground.records import Example
from medground.rollout.cache import Sampling
from medground.rollout.engine import Engine, Limits, plan_cache
from medground.run_folder import environment, write_rows
from medground.scoring import Prediction, blind_baseline, score
from medground.sharding import Ranks, compute_dtype, join_ranks
from medground.weight_files import stored_weights, weights_hash

MAX_ROWS, PREFILL_TOKENS = 256, 8192
"""Most completions decoded at once, and most prompt tokens run at once: what a run's defaults are."""
_NO_RESULT = ("out", "json", "workers", "timeout_minutes")
"""Options that change nothing of the results."""
_OF_ASKING = ("template", "min_pixels", "max_pixels", "max_new_tokens", "precision")
"""Options that the model's folder has an answer to."""


def evaluate_model(config: EvalConfig) -> None:
    """Ask, score, write `config.out` and print what came of it.

    Raises:
        ValueError: the model, the data or the folder is not usable, or an image cannot be read; on every rank.
        OutOfMemory: in words.
    """
    timeout = 60 * config.timeout_minutes
    with (
        join_ranks(2 * timeout) as ranks,
        watch(ranks.progress, ranks.store, ranks.rank, ranks.size, timeout),
        memory_explained(ranks.progress),
    ):
        evaluate_on(ranks, config)


def evaluate_on(ranks: Ranks, config: EvalConfig) -> None:
    """The same on ranks that have met; every one of them must call it."""
    job = ranks.together(lambda: _check(config, ranks))
    held = ranks.together(lambda: eval_folder.start(job.out, job.asked) if ranks.is_first else None)
    with held or nullcontext():
        if not ranks.gather((job.out / eval_folder.EVAL).exists())[0]:
            _answer(config, job, ranks)
            if ranks.is_first:
                _conclude(config, job, ranks)
        if ranks.is_first:
            _show(config, job.out)


class _Job(NamedTuple):
    """What is asked, of what, and where its results go.

    Attributes:
        folder: the model's, on this machine.
        examples: the records.
        blind: those that the control blind chooses its boxes from; empty without it.
        processor: of the model.
        asking: how the model is asked.
        limits: of decoding.
        asked: all that decides the results.
        out: folder of the results.
    """

    folder: Path
    examples: list[Example]
    blind: list[Example]
    processor: Processor
    asking: Asking
    limits: Limits
    asked: dict[str, Any]
    out: Path


def _check(config: EvalConfig, ranks: Ranks) -> _Job:
    """Everything that can be known before the first answer."""
    folder = _model_folder(config.model)
    model = check_model(folder)
    text = model.text_config
    named = {name: getattr(config, name) for name in _OF_ASKING}
    asking = asking_for(folder, model.model_type, named, tell=ranks.is_first)
    stored_weights(folder)
    names = ", ".join(config.data)
    records = [example for part in load_folders(config.data) for example in part]
    examples = select(records, config.split, names)
    blind = select(records, config.train_split, names) if "blind" in config.controls else []
    if blind and not any(example.boxes for example in blind):
        raise ValueError(f"{names}: want a record with a box in split {config.train_split!r} for the control blind")
    if "shuffled" in config.controls:
        questions(examples, "shuffled")  # of two patients or more
    processor = load_processor(folder, asking.min_pixels, asking.max_pixels)
    shown = examples + (with_swapped_sides(examples) if "flipped" in config.controls else [])
    P, told = longest_prompt(shown, processor, asking.template)
    if P + asking.max_new_tokens > text.max_position_embeddings:
        raise ValueError(
            f"max_pixels, max_new_tokens: want a prompt and {asking.max_new_tokens} new tokens within the model's "
            f"context of {text.max_position_embeddings} tokens; {told}"
        )
    dtype = compute_dtype(ranks, asking.precision)
    limits = Limits(P, asking.max_new_tokens, MAX_ROWS, config.cache_gb * 1e9, PREFILL_TOKENS)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    try:
        plan_cache(text, dtype, limits, prompts=1, copies=1)
        check_shared_memory(config.workers, 0, P, here)
    except ValueError as error:  # whose options are a run's
        raise ValueError(f"{str(error).replace('rollout.', '').replace('data.', '')}; {told}") from None
    asked = {name: value for name, value in asdict(config).items() if name not in _NO_RESULT}
    asked |= {name: getattr(asking, name) for name in _OF_ASKING}
    asked |= {"dtype": str(dtype).removeprefix("torch."), "device": ranks.device.type}
    asked |= {"model_sha256": weights_hash(folder), "data_sha256": folders_hash(config.data)}
    asked = json.loads(json.dumps(asked))
    return _Job(folder, examples, blind, processor, asking, limits, asked, Path(config.out or _named(config, asked)))


def _model_folder(path: str) -> Path:
    """The model's folder on this machine; what is likely to be meant where it is another one."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model: want a whole model; {path} holds adapters alone. An export of medground train has them merged: "
            "the folder above"
        )
    if (folder / "metrics.jsonl").is_file():
        raise ValueError(f"model: want a model folder; {path} is one of a run, whose model is {folder / 'export'}")
    try:
        return model_folder_of(path)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "model")) from None


def _named(config: EvalConfig, asked: Mapping[str, Any]) -> str:
    """A folder for these options and no others."""
    model = "-".join(Path(config.model).parts[-2:]).strip("/").replace("..", "")
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    return f"runs/eval/{model}-{config.split}-{digest}"


class _Share(NamedTuple):
    """A piece and what is asked in it."""

    piece: Piece
    questions: Sequence[Question]


def _evaluations(config: EvalConfig) -> list[Asked]:
    """What the model is asked."""
    return ["true", *(control for control in ASKED if control in config.controls)]


def _shares(config: EvalConfig, job: _Job) -> list[_Share]:
    """All pieces, in the same order on every rank."""
    shares = []
    for name in _evaluations(config):
        asked = questions(job.examples, name)
        shares += [
            _Share(Piece(name, start // config.piece), asked[start : start + config.piece])
            for start in range(0, len(asked), config.piece)
        ]
    return shares


def _answer(config: EvalConfig, job: _Job, ranks: Ranks) -> None:
    """Ask all that has not been answered yet; every rank must call it, each does its share."""
    there = ranks.together(lambda: set(eval_folder.finished(job.out)) if ranks.is_first else set())
    there = ranks.gather(there)[0]
    left = [share for share in _shares(config, job) if share.piece not in there]
    ranks.progress.now("load")
    if left:
        policy = build_whole(job.folder, compute_dtype(ranks, job.asking.precision), ranks)
        engine = Engine(policy, job.processor.tokenizer, job.limits)
        count = sum(len(share.questions) for share in left[ranks.rank :: ranks.size])
        ranks.progress.now("evaluation", f"{len(job.examples)} records")
        make = PromptMaker(config.data, job.processor, job.asking.template)
        with (
            closing(Part(job.out, ranks.rank)) as part,
            closing(Loader(make, workers=config.workers, ahead=AHEAD)) as loader,
            tqdm(total=count * config.samples, desc="eval", disable=not ranks.is_first) as bar,
        ):
            ranks.together(lambda: _ask(config, job, left[ranks.rank :: ranks.size], engine, loader, part, ranks, bar))
    ranks.barrier()


def _ask(
    config: EvalConfig,
    job: _Job,
    shares: Sequence[_Share],
    engine: Engine,
    loader: Loader,
    part: Part,
    ranks: Ranks,
    bar: tqdm,
) -> None:
    """Answer this rank's pieces one after another, prompts of the next ones being made meanwhile."""

    def moving() -> bool:
        ranks.progress.tick()
        return False

    with closing(loader(question for share in shares for question in share.questions)) as prompts:
        for share in shares:
            bar.set_postfix_str(share.piece.evaluation)
            answers = engine.roll_out(
                islice(prompts, len(share.questions)),
                count=min(config.piece, len(job.examples)),  # the same cache for the last piece, which may be short
                copies=config.samples,
                sampling=Sampling(config.temperature),
                seed=config.seed,
                bar=bar,
                stop=moving,
            )
            found = {number: predictions_of(share.questions[number], group) for number, group in answers}
            rows = [prediction.row() for number in sorted(found) for prediction in found[number]]
            part.add(share.piece, rows)


def _conclude(config: EvalConfig, job: _Job, ranks: Ranks) -> None:
    """Metrics of everything, and the files."""
    ranks.progress.now("scores")
    pieces = eval_folder.finished(job.out)
    found: dict[str, list[Prediction]] = {}
    for asked in _evaluations(config):
        numbers = sorted(piece.number for piece in pieces if piece.evaluation == asked)
        found[asked] = [Prediction.of_row(row) for number in numbers for row in pieces[Piece(asked, number)]]
        assert len(found[asked]) == config.samples * len(job.examples), (asked, len(found[asked]))
    found |= {name: constant_answers(job.examples, name) for name in CONSTANT if name in config.controls}
    results: dict[str, Any] = {}
    for name, predictions in found.items():
        write_rows(job.out / _file(name), (prediction.row() for prediction in predictions))
        results[name] = {"predictions": _file(name), **score(predictions)}
    if "flipped" in found:
        results["flipped"] |= _agreement(found["true"], found["flipped"], job.examples)
    if job.blind:
        results["blind"] = blind_baseline(job.blind, job.examples)
    facts = environment(ranks.size, config.seed, job.asked["data_sha256"], config.model)
    result = {"options": job.asked, "records": len(job.examples), "evaluations": results, "environment": facts}
    eval_folder.complete(job.out, result)


def _agreement(plain: list[Prediction], flipped: list[Prediction], examples: list[Example]) -> dict[str, Any]:
    """How the answers to mirrored films agree with those to the films, and how many phrases could not be swapped."""
    pairs = agreement(plain, flipped)
    metrics = score(pairs)["metrics"]["miou"] if pairs else {"value": None, "low": None, "high": None, "n": 0}
    return {"agreement": metrics, "phrases_not_swapped": len(examples) - len(with_swapped_sides(examples))}


def _file(evaluation: str) -> str:
    return "predictions.jsonl" if evaluation == "true" else f"predictions.{evaluation}.jsonl"


def _show(config: EvalConfig, out: Path) -> None:
    text = (out / eval_folder.EVAL).read_text(encoding="utf-8")
    print(text.rstrip() if config.json else f"{table(json.loads(text))}\n\neverything: {out / eval_folder.EVAL}")
