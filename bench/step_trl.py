"""TRL's side of `bench.step_against_trl`: its GRPOTrainer, with an eye on its phases."""

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from bench.race import UnavailableError
from bench.random_model import TEMPLATE
from bench.step_job import LR, NO_LIMIT, Capture, Job, reward
from medground.prompts import IMAGE_TOKEN, TEMPLATES, load_processor

PACKAGES = ("datasets", "accelerate", "trl")


def need_trl() -> None:
    """See that TRL can be imported.

    Raises:
        UnavailableError: it cannot; names the package that is missing.
    """
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            missing = error.name or package
            raise UnavailableError(
                f"want {', '.join(PACKAGES)}; {missing} is not installed: `make peers`, then PYTHONPATH=peers"
            ) from error


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without the part for videos, which insists on torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = IMAGE_TOKEN, "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Watch(TrainerCallback):
    """Stops the trainer's clock after each step, hands over to us, and starts it again.

    Attributes:
        seconds: of each step and its phases, but the first, which warms up. Reading images counts as update.
        capture: what the first step was.
        rollout: seconds of the last step's `generate`.
        rest: seconds of tokenising, images, rewards and advantages.
    """

    def __init__(self, job: Job, rounds: int, between: Callable[[Capture], None]):
        self.job, self.rounds, self.between = job, rounds, between
        self.seconds: list[dict[str, float]] = []
        self.capture: Capture | None = None
        self.generated: dict[str, torch.Tensor] = {}
        self.rollout = self.rest = self._start = 0.0

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._start = self.now()

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs: Any) -> None:
        if self.capture is None:
            B, G = len(self.job.examples), self.job.size.G
            found = {name: self.generated[name].cpu() for name in ("prompt_ids", "completion_ids", "advantages")}
            self.capture = Capture(
                found["prompt_ids"][::G],
                found["completion_ids"].view(B, G, -1),
                found["advantages"].view(B, G),
                {name: weight.grad.float().to("cpu", copy=True) for name, weight in model.named_parameters()},
            )

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        whole = self.now() - self._start
        if state.global_step > 1:
            update = whole - self.rollout - self.rest
            self.seconds.append({"step": whole, "rollout": self.rollout, "update": update, "the rest": self.rest})
        C = self.generated["completion_mask"].sum(1).unique().tolist()
        if C != [self.job.size.C]:
            raise ValueError(f"want completions of {self.job.size.C} tokens from TRL; got {C}")
        assert self.capture
        self.between(self.capture)
        control.should_training_stop = len(self.seconds) == self.rounds
        self._start = self.now()

    def now(self) -> float:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def run_trl(job: Job, folder: Path, rounds: int, between: Callable[[Capture], None]) -> Watch:
    """Train a step to warm up and then `rounds`; `between` runs after each of them, off the clock."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    watch = Watch(job, rounds, between)

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = watch.now()
            out = super()._generate_single_turn(*args, **kwargs)
            watch.rollout = watch.now() - start
            return out

        def _generate_and_score_completions(self, inputs):
            start = watch.now()
            watch.generated = super()._generate_and_score_completions(inputs)
            watch.rest = watch.now() - start - watch.rollout
            return watch.generated

    trainer = Trainer(
        model=str(job.model),
        reward_funcs=_rewards,
        args=GRPOConfig(**_arguments(job, folder)),
        train_dataset=_dataset(job, datasets),
        processing_class=_processor(job),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch


def _rewards(completions: list, **_: Any) -> list[float]:
    return [reward(messages[0]["content"]) for messages in completions]


def _arguments(job: Job, folder: Path) -> dict[str, Any]:
    B, G = len(job.examples), job.size.G
    cuda = job.device.type == "cuda"
    return {
        "output_dir": str(folder),
        "use_cpu": not cuda,
        "bf16": cuda,
        "num_generations": G,
        "max_completion_length": job.size.C,
        "per_device_train_batch_size": G * job.groups_at_once,
        "gradient_accumulation_steps": B // job.groups_at_once,
        "gradient_checkpointing": job.checkpointing,
        "max_steps": 1000,
        "learning_rate": LR,
        "max_grad_norm": NO_LIMIT,
        "loss_type": "dapo",
        "beta": 0.0,
        "shuffle_dataset": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
    }


def _dataset(job: Job, datasets):
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"prompt": [message], "image": datasets.Image(mode="RGB")})
    rows = {
        "prompt": [
            [{"role": "user", "content": TEMPLATES[TEMPLATE].format(phrase=example.phrase)}] for example in job.examples
        ],
        "image": [{"path": str(job.data / example.image)} for example in job.examples],
    }
    table = datasets.table.InMemoryTable.from_pydict(rows, schema=features.arrow_schema)
    # for a fingerprint it would pickle pyarrow, which fails where that lies outside of "site-packages", as in peers/
    return datasets.Dataset(table, fingerprint="films")


def _processor(job: Job) -> ImageProcessor:
    ours = load_processor(job.model, job.pixels, job.pixels)
    return ImageProcessor(ours.images, ours.tokenizer, chat_template=ours.tokenizer.chat_template)
