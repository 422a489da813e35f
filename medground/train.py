"""The training loop, in the order things happen.

    torchrun --nproc-per-node 2 -m medground.train demo --optimizer.lr 5e-4

    prompts -> rollout -> rewards -> advantages -> GRPO loss -> AdamW -> checkpoint, evaluation

Shapes: B prompts a step over all ranks, G completions each, S sequences and N completion tokens in a
micro-batch.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from medground.checkpoint import export_policy, load_checkpoint, save_checkpoint
from medground.config import Config, differing_fields
from medground.datasets.manifest import load_records, records_hash, select
from medground.evaluate import Asker, read_answer
from medground.policy import Policy, check_model, load_policy, pack_rows
from medground.prompts import Processor, check_phrase, load_processor
from medground.records import Example, Group, Prompt
from medground.report.page import write_report
from medground.rewards.total import score_answers
from medground.rollout import roll_out
from medground.run_folder import RunFolder, check_folder, environment
from medground.sharding import Ranks, SharedError, gathered, join_ranks, shard
from medground.step_metrics import Clock, Totals, sample_rows, step_totals, update_statistics
from medground.summary import Splits, evaluate_curve, evaluate_test, summarise
from medground_kernels.group_advantage import group_advantage


def train(config: Config) -> None:
    """Train, evaluate and export as `config` says.

    Raises:
        ValueError: the configuration, the data, the model or the folder is not usable; raised on
            every rank, before the first step.
    """
    started = time.perf_counter()
    with join_ranks() as ranks:
        splits, data_hash, model_folder, processor = _check(config, ranks)
        policy = shard(_load(model_folder, config), ranks, config.model.precision)
        reference = shard(_load(model_folder, config), ranks, config.model.precision) if config.loss.beta else None
        optimizer = _optimizer(policy, config)
        asker = Asker(policy, processor, config, ranks)

        done = load_checkpoint(Path(config.out) / "checkpoints", policy, optimizer) if config.resume else 0
        facts = environment(ranks.size, config.seed, data_hash, config.model.path)
        run = RunFolder(config, facts) if ranks.is_first else None
        if run:
            run.start(done)
        if not done:
            evaluate_test(asker, splits, run, step=0)
        _steps(asker, reference, optimizer, splits, run, done)
        # a run may have been stopped after its last checkpoint, within its last evaluation
        last_written = Path(config.out) / "eval" / f"step-{config.steps:06d}.curve.json"
        if done < config.steps or not ranks.gather(last_written.exists())[0]:
            evaluate_test(asker, splits, run, step=config.steps)
        export_policy(Path(config.out) / "export", policy, model_folder, ranks)
        if run:
            with closing(run):
                run.write_json("summary.json", summarise(config, splits, run, facts, time.perf_counter() - started))
            write_report(run.path, Path(config.data.path), run.path / "report.html")


def _steps(
    asker: Asker,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    splits: Splits,
    run: RunFolder | None,
    done: int,
) -> None:
    """Every step from `done` on."""
    config, ranks, policy = asker.config, asker.ranks, asker.policy
    batches = _batches(asker, splits.train, done)
    bar = tqdm(range(done, config.steps), initial=done, total=config.steps, desc="GRPO", disable=not ranks.is_first)
    for step in bar:
        clock = Clock()
        prompts = next(batches)
        clock.lap("data")

        with gathered(policy):
            groups = roll_out(
                policy,
                asker.processor.tokenizer,
                prompts,
                copies=config.rollout.group_size,
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                seed=config.seed,
                step=step,
            )
        clock.lap("rollout")

        answers = [[read_answer(r.text, g.prompt) for r in g.rollouts] for g in groups]
        rewards = score_answers(answers, [g.prompt.example.boxes for g in groups], config.reward)
        advantages = group_advantage(rewards.total, normalize=config.loss.advantage)  # [B, G]
        clock.lap("reward")

        totals = step_totals(groups, rewards, ranks)
        updated = _update(policy, reference, optimizer, groups, advantages, totals, config, ranks, step)
        clock.lap("update")

        metrics = {"step": step + 1} | totals.means | updated | clock.seconds(totals.tokens)
        if run:
            run.log(metrics)
            bar.set_postfix_str(f"reward {metrics['reward']:.3f}, IoU {metrics['iou']:.3f}")
        if (step + 1) % config.samples_every == 0 or step in (0, config.steps - 1):
            shares = ranks.gather(sample_rows(groups, answers, rewards, advantages))
            if run:
                run.write_rows(f"samples/step-{step + 1:06d}.jsonl", (row for share in shares for row in share))
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0 and step + 1 < config.steps:
            evaluate_curve(asker, splits, run, step + 1)
        if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
            folder = Path(config.out) / "checkpoints"
            save_checkpoint(folder, step + 1, policy, optimizer, ranks, config.checkpoint.keep)


def _batches(asker: Asker, examples: Sequence[Example], first: int) -> Iterator[list[Prompt]]:
    """This rank's prompts of each step from `first` on; the next step's are made while one runs."""

    def prompts_of(step: int) -> list[Prompt]:
        return [asker.prompt(example) for example in _share(examples, asker.config, asker.ranks, step)]

    with ThreadPoolExecutor(1) as maker:
        waiting = maker.submit(prompts_of, first)
        for step in range(first, asker.config.steps):
            prompts = waiting.result()
            if step + 1 < asker.config.steps:
                waiting = maker.submit(prompts_of, step + 1)
            yield prompts


def _update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    advantages: Tensor,
    totals: Totals,
    config: Config,
    ranks: Ranks,
    step: int,
) -> dict[str, float]:
    """`inner_epochs` optimizer steps on this rank's groups; how they are cut changes nothing."""
    options = config.loss.options(
        temperature=config.rollout.temperature, max_completion_length=config.rollout.max_new_tokens
    )
    size, T = config.loss.micro_batch_groups, config.rollout.temperature
    cuts = [slice(start, start + size) for start in range(0, len(groups), size)]
    micro = [(pack_rows(groups[cut], policy.image_token, ranks.device), groups[cut], advantages[cut]) for cut in cuts]
    with torch.no_grad():
        ref_logps = [reference(rows, T).logp if reference else None for rows, _, _ in micro]
    lr = _learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr

    stats, losses, norms = [], [], []
    for _ in range(config.loss.inner_epochs):
        for i, (rows, chunk, advantage) in enumerate(micro):
            cast(FSDPModule, policy).set_requires_gradient_sync(i + 1 == len(micro))
            # dapo and cispo are normalised by all tokens already, the others by the sequences of this micro-batch
            share = 1.0 if options.loss_type in ("dapo", "cispo") else advantage.numel() / totals.sequences
            bonus = options.entropy_coef * len(rows.targets) / totals.tokens / share  # a mean over this micro-batch
            loss, stat, _ = policy.loss(
                rows,
                advantage.flatten().to(ranks.device),
                old_logp=torch.cat([r.logp for g in chunk for r in g.rollouts]).to(ranks.device),
                ref_logp=ref_logps[i],
                options=replace(options, entropy_coef=bonus),
                total_tokens=totals.tokens,
            )
            (loss * share * ranks.size).backward()  # FSDP2 averages over the ranks; we want the sum
            losses.append(loss.detach() * share)
            stats.append(stat)
        limit = config.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), limit, error_if_nonfinite=True)
        norms.append(norm.full_tensor())  # type: ignore[attr-defined]  # a DTensor under FSDP2
        optimizer.step()
        optimizer.zero_grad()
    return update_statistics(stats, losses, norms, config.loss.inner_epochs, ranks) | {"lr": lr}


def _learning_rate(config: Config, step: int) -> float:
    o = config.optimizer
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    left = (config.steps - 1 - step) / max(config.steps - 1 - o.warmup_steps, 1)
    return o.lr * (o.final_lr_fraction + (1 - o.final_lr_fraction) * left)


def _share(examples: Sequence[Example], config: Config, ranks: Ranks, step: int) -> list[Example]:
    """This rank's prompts of a step: a slice of an endless stream of shuffled epochs, no record left out.

    Where an epoch ends within a step, a record may stand twice in it, and draws the same completions twice.
    """
    B, n = config.rollout.prompts_per_step, len(examples)
    mine = B // ranks.size
    first = step * B + ranks.rank * mine
    positions = range(first, first + mine)
    orders = {epoch: _order(n, config.seed, epoch) for epoch in {p // n for p in positions}}
    return [examples[orders[p // n][p % n]] for p in positions]


def _order(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + (epoch << 31))).tolist()


def _check(config: Config, ranks: Ranks) -> tuple[Splits, str, Path, Processor]:
    """Everything a user may have got wrong, before any work: the same answer on every rank."""
    first, *others = ranks.gather(config)
    for rank, other in enumerate(others, 1):
        if differing := differing_fields(first, other):
            raise SharedError(f"rank {rank} was started with another configuration than rank 0: {'; '.join(differing)}")
    B = config.rollout.prompts_per_step
    if B % ranks.size:
        raise SharedError(f"rollout.prompts_per_step: want a multiple of the {ranks.size} ranks; got {B}")

    def check() -> tuple[Splits, str, Path, Processor]:
        records = load_records(config.data.path)
        data_hash = records_hash(config.data.path)
        check_folder(config, data_hash)
        model_folder = _model_folder(config.model.path)
        check_model(model_folder)
        processor = load_processor(model_folder, config.data.min_pixels, config.data.max_pixels)
        for example in records:
            check_phrase(example, processor)
        names = (config.data.train_split, config.data.curve_split, config.data.test_split)
        train, curve, test = (select(records, name, config.data.path) for name in names)
        if not any(example.boxes for example in train):
            raise ValueError(f"{config.data.path}: want a record with a box in split {names[0]!r}; got none")
        if len({example.patient for example in test}) < 2:
            raise ValueError(f"{config.data.path}: want two patients or more in split {names[2]!r} (shuffled images)")
        return Splits(train, curve[: config.evaluation.curve_records], test), data_hash, model_folder, processor

    return ranks.together(check)


def _model_folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"model.path: want a model folder or a name on the hub; got {path!r}: {error}") from None


def _load(model_folder: Path, config: Config) -> Policy:
    policy = load_policy(model_folder)
    policy.vlm.model.visual.requires_grad_(not config.model.freeze_vision)
    if config.model.gradient_checkpointing:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def _optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    o = config.optimizer
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True)


if __name__ == "__main__":
    from medground.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
