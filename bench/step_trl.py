"""TRL's side of `bench.steps`: its GRPOTrainer at its defaults, with an eye on its phases.

Its head is fused since 1.16: log-probabilities come a chunk of logits at a time. `fused=False` gives it whole logits
again, as earlier releases and trainers made after them have them.
"""

import gc
import importlib
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from bench.race import UnavailableError
from bench.random_model import TEMPLATE
from bench.step_job import LR, NO_LIMIT, PHASES, SEED, Capture, Job, Seconds, gradients, reward
from bench.step_rows import END, exact_lengths, make_row_processor
from medground.lora import draw_adapters, peft_config
from medground.prompts import TEMPLATES

PACKAGES = ("datasets", "accelerate", "greenlet", "trl")


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


class TrlSide:
    """A GRPOTrainer in a greenlet, which hands control back after each step until it is asked for the next one.

    Not in a thread: each thread that computes has OpenMP's workers of its own, and with more of them than cores small
    operations take twice as long, on all sides.

    Attributes:
        capture: what the first step was.
    """

    def __init__(self, job: Job, folder: Path, fused: bool = True):
        need_trl()
        from greenlet import greenlet

        logging.set_verbosity_error()
        self.capture: Capture | None = None
        self._watch = _Watch(job, self)
        self._trainer = _make_trainer(job, folder, fused, self._watch)
        self._run = greenlet(lambda _: self._trainer.train())

    def step(self) -> Seconds:
        return self._run.switch(True)

    def close(self) -> None:
        if self._run:  # begun, and not ended by an error
            self._run.switch(False)
        del self._trainer, self._watch, self._run
        gc.collect()
        torch.cuda.empty_cache()

    def hand_over(self, seconds: Seconds) -> bool:
        """In the trainer's greenlet, a step being done: whether there is to be another one."""
        return self._run.parent.switch(seconds)


class _Watch(TrainerCallback):
    """Marks where phases end, and stops the trainer between steps."""

    def __init__(self, job: Job, side: TrlSide):
        self.job, self.side = job, side
        self.steps = 0
        self.generated: dict[str, torch.Tensor] = {}
        self._seconds: Seconds = {}
        self._last = 0.0

    def lap(self, phase: str) -> None:
        """End a phase; one that returns adds up."""
        now = self._now()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._last = self._now()

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._begin()

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs: Any) -> None:
        self.lap("update")
        if self.side.capture is None:
            self.side.capture = self._capture(model)
            self._last = self._now()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self.lap("optimizer")
        found = self.generated["completion_mask"].sum(1).view(len(self.job.examples), -1).tolist()
        wanted = self.job.lengths(self.steps)
        if found != wanted:
            raise ValueError(f"want completions of the lengths {wanted} from TRL; got {found}")
        self.steps += 1
        if self.side.hand_over({"step": sum(self._seconds.values())} | self._seconds):
            self._begin()
        else:
            control.should_training_stop = True

    def _capture(self, model) -> Capture:
        B, G = len(self.job.examples), self.job.size.G
        names = ("prompt_ids", "completion_ids", "completion_mask", "advantages")
        found = {name: self.generated[name].cpu() for name in names}
        rows = [ids[mask.bool()] for ids, mask in zip(found["completion_ids"], found["completion_mask"], strict=True)]
        return Capture(
            found["prompt_ids"][::G],
            [rows[b * G : (b + 1) * G] for b in range(B)],
            found["advantages"].view(B, G),
            gradients(model),
        )


def _make_trainer(job: Job, folder: Path, fused: bool, watch: _Watch):
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            watch.lap("data")
            out = super()._generate_single_turn(*args, **kwargs)
            watch.lap("decode")
            return out

        def _generate_and_score_completions(self, inputs):
            watch.generated = super()._generate_and_score_completions(inputs)
            watch.lap("reward")
            return watch.generated

    processor = make_row_processor(job)
    trainer = (Trainer if fused else _with_whole_logits(Trainer))(
        model=str(job.model),
        reward_funcs=_rewards,
        args=GRPOConfig(**_arguments(job, folder)),
        train_dataset=_dataset(job, datasets),
        processing_class=processor,
        callbacks=[watch],
        peft_config=peft_config(job.lora) if job.lora.rank else None,
    )
    trainer.remove_callback(PrinterCallback)
    draw_adapters(trainer.model, SEED)  # if it has any
    _set_lengths(trainer.model, job, watch, processor.tokenizer.convert_tokens_to_ids(END))
    return trainer


def _set_lengths(model, job: Job, watch: _Watch, end: int) -> None:
    generate, config = model.generate, model.config

    def generate_of_lengths(**inputs):
        processors = exact_lengths(job, watch.steps, end, config, lambda: watch.lap("prefill"))
        return generate(**inputs, logits_processor=processors)

    model.generate = generate_of_lengths


def _with_whole_logits(trainer: type) -> type:
    """The same with the logits of all completion tokens at once."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    class WholeLogits(trainer):
        def _get_per_token_logps_and_entropies(
            self, model, input_ids, attention_mask, logits_to_keep, compute_entropy=False, **inputs
        ):
            del inputs["num_images"]
            inputs = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
            with self.accelerator.autocast():
                out = model(
                    input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1, **inputs
                )
            logits = out.logits[:, :-1] / self.temperature
            logp = selective_log_softmax(logits, input_ids[:, -logits_to_keep:])
            with torch.no_grad():
                entropy = entropy_from_logits(logits) if compute_entropy else None
            return logp, entropy, None

    return WholeLogits


def _rewards(completions: list, **_: Any) -> list[float]:
    return [reward(messages[0]["content"]) for messages in completions]


def _arguments(job: Job, folder: Path) -> dict[str, Any]:
    B, G, work = len(job.examples), job.size.G, job.workload
    cuda = job.device.type == "cuda"
    return {
        "output_dir": str(folder),
        "use_cpu": not cuda,
        "bf16": cuda,
        "model_init_kwargs": {"dtype": str(job.loaded_dtype).removeprefix("torch.")},
        "num_generations": G,
        "max_completion_length": job.size.C,
        "per_device_train_batch_size": G * work.groups_at_once,
        "gradient_accumulation_steps": B // work.groups_at_once,
        "gradient_checkpointing": work.checkpointing,
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
