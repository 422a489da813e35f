"""The `medground` command: each verb reads its options, then imports what it needs."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from medground.config import Config, load_config
from medground.presets import PRESETS, listing

_HELP = """usage: medground COMMAND [OPTIONS]

Reinforcement learning that teaches vision-language models to ground medical phrases.

commands:
  demo            everything below on phantom films, in about ten minutes on two CPU cores
  data phantom    draw a data set of phantom chest films
  data prepare SOURCE   turn an original data set into records: ms-cxr, chestxray8, m3d-refseg, coco, vlm-r1, csv
  data audit DIR  check a data set, and measure what a guess without looking reaches
  base            build the small base model of the demo
  prompt          print what the model is asked, for a template, a phrase, an image
  encoders check NAME   see whether an encoder knows true crops from others, for the semantic reward
  encoders build  train the small encoder for phantom films
  train PRESET    train; under torchrun: torchrun --nproc-per-node N -m medground.train PRESET
  train --config FILE   train with the configuration of an earlier run
  plan PRESET           memory and time of a run on N GPUs, before anybody rents them
  eval            ask a model about a data set: metrics with intervals, controls; under torchrun: -m medground eval
  predict IMAGE PHRASE...   where on an image a trained model finds phrases
  report RUN DATA...    write the page of a run again
  watch RUN             serve that page to browsers on this machine while the run goes on
  score FILE      score predictions, wherever they were made; needs no model
  eval compare A B      how two files of predictions differ, metric by metric, with paired intervals

medground COMMAND --help lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 where a plan does not fit or a run cannot go on, which is named on standard error; 2 where
        the user made a mistake, which is named there too; 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if words else 2
    name = " ".join(words[:2])
    if words[0] not in _TWO_WORDS and name not in _COMMANDS:
        name = words[0]
    try:
        if name not in _COMMANDS:
            raise ValueError(f"unknown command {name!r}; known are {', '.join(_COMMANDS)}")
        return _COMMANDS[name](words[len(name.split()) :]) or 0
    except (ValueError, RuntimeError) as error:
        kind, rank = type(error), os.environ.get("RANK", "0")
        ours = kind.__module__.startswith("medground")
        if isinstance(error, RuntimeError) and not ours:
            raise
        known_to_all = kind.__name__ in _KNOWN_TO_ALL
        if rank == "0" or not known_to_all:
            print(f"medground: error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("medground: interrupted", file=sys.stderr)
        return 130


def _train(words: list[str]) -> None:
    config = train_config(words)
    from medground.train import train

    train(config)


def train_config(words: list[str], verb: str = "train") -> Config:
    """The configuration that `medground train WORDS` asks for.

    Args:
        words: preset or file, and options.
        verb: in place of train, in messages.

    Raises:
        ValueError: the preset or the file is not usable, or a value is impossible.
        SystemExit: an option is unknown or of the wrong type; tyro has named it.
    """
    if words and words[0].startswith("--config="):
        words = ["--config", words[0].removeprefix("--config="), *words[1:]]
    if words[:1] == ["--config"]:
        if len(words) < 2:
            raise ValueError("--config: want a file name; got none")
        return tyro.cli(
            Config, prog=f"medground {verb} --config FILE", args=words[2:], default=load_config(Path(words[1]))
        )
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: medground {verb} PRESET [OPTIONS]\n\npresets (PRESET --help lists the options):\n{listing()}")
        raise SystemExit(0 if words else 2)
    if words[0] not in PRESETS:
        raise ValueError(f"unknown preset {words[0]!r}; known are:\n{listing()}")
    text, default = PRESETS[words[0]]
    return tyro.cli(Config, prog=f"medground {verb} {words[0]}", description=text, args=words[1:], default=default)


_PLAN_HELP = """usage: medground plan PRESET [--gpus N] [--gpu KIND] [--json] [OPTIONS]
       medground plan --config FILE [--gpus N] [--gpu KIND] [--json] [OPTIONS]

Memory of a GPU, by a dry run of the training code on tensors without memory; seconds of a step and what bounds them, on
1 to 1024 GPUs, reckoned. Needs neither GPUs nor weights. Exit status: 0 where the run fits, 1 where it does not.

  --gpus N            how many GPUs (8)
  --gpu KIND          h100-80gb (default), h200-141gb, a100-40gb, a100-80gb, l40s-48gb, rtx-4090-24gb, rtx-a6000-48gb or
                      cpu
  --json              everything as JSON
  --text-tokens N     text of the longest prompt; else of the data and model folders, if they are there, or assumed
  --answer-tokens N   mean length of a completion; else assumed

OPTIONS are those of medground train, whose presets are also here:
"""


def _plan(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="medground plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--text-tokens", type=int, default=None)
    parser.add_argument("--answer-tokens", type=float, default=None)
    args, rest = parser.parse_known_args(words)
    if not rest or rest[0] in ("-h", "--help"):
        print(_PLAN_HELP + "\n".join(f"  {name:20} {text}" for name, (text, _) in PRESETS.items()))
        return 0 if rest else 2
    config = train_config(rest, "plan")
    from tqdm import tqdm

    from medground.plan.planner import Asked, make_plan
    from medground.plan.text import render

    with tqdm(desc="plan", bar_format="{desc}: {postfix} [{elapsed}]") as bar:
        asked = Asked(args.gpu, args.gpus, args.text_tokens, args.answer_tokens)
        plan = make_plan(config, asked, lambda what: bar.set_postfix_str(what))
    print(json.dumps(plan, indent=1) if args.json else render(plan))
    return 0 if plan["memory"]["fits"] else 1


def _prepare(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name}" for name in _SOURCES)
        print(f"usage: medground data prepare SOURCE [OPTIONS]\n\nsources (SOURCE --help lists the options):\n{lines}")
        raise SystemExit(0 if words else 2)
    if words[0] not in _SOURCES:
        raise ValueError(f"unknown source {words[0]!r}; known are {', '.join(_SOURCES)}")
    module, options, function = _SOURCES[words[0]]
    source = importlib.import_module(f"medground.datasets.{module}")
    getattr(source, function)(_options(getattr(source, options), f"medground data prepare {words[0]}", words[1:]))


def _check_encoder(words: list[str]) -> None:
    from medground.encoder_tools import CheckConfig, check_encoder

    program = "medground encoders check NAME"
    if not words or words[0].startswith("-"):
        if words not in (["-h"], ["--help"]):
            raise ValueError("encoders check: want the encoder's name first, as in --reward.encoder; got none")
        _options(CheckConfig, program, words)
    check_encoder(words[0], _options(CheckConfig, program, words[1:]))


def _report(words: list[str]) -> None:
    if len(words) < 2 or words[0] in ("-h", "--help"):
        print("usage: medground report RUN DATA...\n\nWrites RUN/report.html; DATA: the folders of its records.")
        raise SystemExit(0 if words[:1] in (["-h"], ["--help"]) else 2)
    from medground.report.page import write_report

    run = Path(words[0])
    write_report(run, words[1:], run / "report.html")
    print(run / "report.html")


def _options(kind: Any, program: str, words: list[str]) -> Any:
    return tyro.cli(kind, prog=program, args=words)


def _plain(name: str) -> Callable[[list[str]], None]:
    """A verb of `_VERBS`: its options are read first, then its function is imported, with torch and all."""

    def run(words: list[str]) -> None:
        home, kind, module, function = _VERBS[name]
        config = _options(getattr(_module(home), kind), f"medground {name}", words)
        getattr(_module(module or home), function)(config)

    return run


def _module(name: str) -> Any:
    return importlib.import_module(f"medground.{name}")


_KNOWN_TO_ALL = ("SharedError", "CheckpointError", "DivergedError")
"""Errors that every rank has; by name, since their modules import torch."""

_SOURCES = {  # name -> file of medground/datasets, its options, its function
    "ms-cxr": ("ms_cxr", "MsCxrConfig", "prepare_ms_cxr"),
    "chestxray8": ("chestxray8", "ChestXray8Config", "prepare_chestxray8"),
    "m3d-refseg": ("m3d_refseg", "M3dRefSegConfig", "prepare_m3d_refseg"),
    "coco": ("coco", "CocoConfig", "prepare_coco"),
    "vlm-r1": ("vlm_r1", "VlmR1Config", "prepare_vlm_r1"),
    "csv": ("own_csv", "OwnCsvConfig", "prepare_csv"),
}
_TWO_WORDS = ("data", "encoders")
"""Verbs that want a second word."""

_VERBS = {  # name -> module of its options, their class, module of its function ("" for the same), the function
    "data phantom": ("datasets.phantom", "PhantomConfig", "", "write_phantom"),
    "data audit": ("audit.audit", "AuditConfig", "", "run_audit"),
    "base": ("base_config", "BaseConfig", "base_model", "build_base"),
    "prompt": ("show_prompt", "ShowPromptConfig", "", "show_prompt"),
    "encoders build": ("encoder_tools", "BuildConfig", "", "build_encoder"),
    "eval": ("eval_config", "EvalConfig", "evaluate_model", "evaluate_model"),
    "demo": ("demo", "DemoConfig", "", "run_demo"),
    "watch": ("report.live", "WatchConfig", "", "run_watch"),
    "predict": ("predict_config", "PredictConfig", "predict", "run_predict"),
    "score": ("scoring.command", "ScoreConfig", "", "run_score"),
    "eval compare": ("scoring.compare", "CompareConfig", "", "run_compare"),
}
_COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    **{name: _plain(name) for name in _VERBS},
    "data prepare": _prepare,
    "encoders check": _check_encoder,
    "train": _train,
    "plan": _plan,
    "report": _report,
}
