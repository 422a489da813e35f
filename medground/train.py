"""The training loop, in the order things happen.

    torchrun --nproc-per-node 2 -m medground.train demo --optimizer.lr 5e-4

    prompts -> rollout -> rewards -> advantages -> GRPO loss -> AdamW -> checkpoint, evaluation

Shapes: B prompts a step over all ranks, G completions each, S sequences and N completion tokens in a
micro-batch.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig

from medground.adamw import set_learning_rate
from medground.asking import asking_of
from medground.audit.rewards import brief_audit, warnings_of
from medground.augmentation import never_mirrored
from medground.build import Score, build_optimizer, build_policy, build_reference
from medground.checkpoint import Checkpoints
from medground.config import Config
from medground.costs import network_of, peak_of, sizes_of, step_operations
from medground.data_order import DataOrder
from medground.datasets.folders import manifest_hashes
from medground.evaluate import Asker, read_answer
from medground.export import export_policy
from medground.job.interruption import InterruptedRun, Interruption
from medground.job.memory import memory_explained
from medground.job.watch import watch
from medground.loading import AHEAD, Loader, PromptMaker, prompts_of_steps
from medground.micro_batches import Load, deal
from medground.model_card import write_cards
from medground.packing import Packed, pack
from medground.policy import Policy
from medground.preflight import check_job
from medground.prompts import question_text
from medground.records import Answer, Group, Prompt
from medground.report.page import write_report
from medground.resampling import spare_questions
from medground.reward_watch import RewardWatch, answer_metrics
from medground.rewards.total import Rewards, Scorer, group_means
from medground.rollout.cache import Sampling
from medground.rollout.engine import Engine, RolloutStats
from medground.run_folder import RunFolder, environment, restarted
from medground.sharding import Ranks, WholeCopy, compute_dtype, join_ranks, reduce_gradients
from medground.step_metrics import Clock, Totals, sample_rows, step_totals, update_statistics
from medground.summary import Splits, evaluate_if_due, summarise
from medground.taking_part import advantages_of, taking_part
from medground_kernels.varlen_attention import backend_name


def train(config: Config) -> None:
    """Train, evaluate and export as `config` says; SIGTERM and SIGUSR1 end it early, its state saved.

    Raises:
        ValueError: the configuration, the data, the model or the folder is not usable; raised on
            every rank, before the first step.
        DivergedError, CheckpointError, OutOfMemory: the run cannot go on; checkpoints are as they were.
    """
    started, timeout = time.perf_counter(), 60 * config.timeout_minutes
    with (
        join_ranks(2 * timeout) as ranks,
        watch(ranks.progress, ranks.store, ranks.rank, ranks.size, timeout),
        memory_explained(ranks.progress),
        Interruption() as interruption,
    ):
        config = replace(config, resume=config.resume or ranks.any(restarted(config)))
        splits, order, data_hash, model_folder, processor, limits, encoder = check_job(config, ranks)
        asked, config = config, config.in_steps(len(splits.train))
        ranks = ranks.arranged(config.sharding.replicas)
        held = ranks.together(lambda: RunFolder(config) if ranks.is_first else None)
        checkpoints = Checkpoints(Path(config.out) / "checkpoints", ranks, config.checkpoint.keep)
        make = PromptMaker(config.data.path, processor, config.prompt.template, config.data.augment, config.seed)
        workers, mine = config.data.workers, config.rollout.prompts_per_step // ranks.size
        with (
            closing(held) if held else nullcontext() as run,
            closing(checkpoints),
            closing(Loader(make, workers=workers, ahead=mine)) as training,
            closing(Loader(make, workers=workers, ahead=AHEAD)) as loader,
        ):
            ranks.progress.now("load")
            policy = build_policy(model_folder, config, ranks)
            reference = build_reference(policy, model_folder, config, ranks)
            optimizer = build_optimizer(policy, config)
            whole = WholeCopy(policy, ranks, config.model.precision)
            if config.model.compile:
                whole.policy.compile_layers()
            engine = Engine(whole.policy, processor.tokenizer, limits)
            asker = Asker(policy, whole, engine, loader, config, ranks, interruption)
            if ranks.is_first:
                half = whole.policy.vlm.dtype != torch.float32
                print(f"attention: {backend_name(ranks.device if half else 'cpu')}")

            done, facts = checkpoints.load(policy, optimizer) if config.resume else (0, {})
            described = environment(ranks.size, config.seed, data_hash, config.model.path)
            described["records"] = {name: len(part) for name, part in splits._asdict().items()}
            described["manifests_sha256"] = manifest_hashes(config.data.path)
            if config.data.augment.flip:
                described["records_never_mirrored"] = never_mirrored(splits.train)
            if run:
                run.start(asked, described, done)
            limit = config.rollout.max_new_tokens
            scorer = Scorer(config.reward, config.prompt.template, limit, ranks.device, splits.train, encoder)
            _audit_rewards(scorer, make, splits, config, ranks, run)
            batches = prompts_of_steps(training, order, config, ranks, done)
            if not _steps(asker, batches, order, reference, optimizer, scorer, splits, run, checkpoints, done, facts):
                return
            ranks.progress.now("export")
            asking = asking_of(config, policy.vlm.config.model_type)
            export_policy(Path(config.out) / "export", policy, model_folder, ranks, config.model.path, asking)
            if run:
                seconds = time.perf_counter() - started
                run.write_json("summary.json", summarise(config, splits, run, described, seconds))
                write_report(run.path, config.data.path, run.path / "report.html")
                write_cards(run.path, model_folder, question_text("{phrase}", config.prompt.template))


def _steps(
    asker: Asker,
    batches: Iterator[list[Prompt]],
    order: DataOrder,
    reference: Score | None,
    optimizer: torch.optim.Optimizer,
    scorer: Scorer,
    splits: Splits,
    run: RunFolder | None,
    checkpoints: Checkpoints,
    done: int,
    facts: dict[str, Any],
) -> bool:
    """Every step from `done` on, and the evaluations between them; False where a signal ended it."""
    config, ranks, policy = asker.config, asker.ranks, asker.policy
    bar = tqdm(range(done, config.steps + 1), initial=done, total=config.steps, desc="GRPO", disable=not ranks.is_first)
    network, peak = network_of(policy), peak_of(ranks, compute_dtype(ranks, config.model.precision))
    saving, saved, skipped = 0.0, done, facts.get("skipped", 0)
    rewards_watch = RewardWatch()
    scorer.load(facts)
    rewards_watch.load(facts)
    try:
        for step in bar:  # the weights are those after `step` steps
            asker.interruption.agree(ranks)
            if ranks.any(checkpoints.failed):
                checkpoints.wait()
            evaluate_if_due(asker, splits, run, step)
            if step == config.steps:
                break
            clock = Clock(saving, peak)
            ranks.progress.now("data", f"step {step + 1}")
            prompts = next(batches)
            clock.lap("data")

            groups, answers, rewards, rollout = _earn(asker, scorer, order, prompts, step, clock)
            advantages = advantages_of(rewards, config.loss)  # [B, G]
            in_update = taking_part(groups, rewards, config.loss)  # [B, G]
            clock.lap("reward")

            work = step_operations(
                network, sizes_of(groups), scorings=_scorings(config), epochs=config.loss.inner_epochs
            )
            totals = step_totals(groups, rewards, rollout, work, ranks)
            trained = totals.of(groups, in_update, ranks)
            micro = _micro_batches(policy, groups, advantages, config, ranks, in_update)
            largest = max(micro, key=lambda batch: len(batch.packed.input_ids))
            ranks.progress.now("score", f"step {step + 1}: {largest.shapes}")
            _score(policy, reference, micro, config)
            clock.lap("score")

            updated = _update(policy, optimizer, micro, trained, config, ranks, step, clock)
            clock.lap("update")

            of_answers = answer_metrics(groups, answers, rewards, ranks)
            metrics = {"step": step + 1} | totals.means | of_answers | updated | clock.seconds(totals)
            warning = rewards_watch.observe(totals.means["reward"], totals.means["iou"])
            if config.loss.resample_prompts:
                metrics["resampled_prompts"] = sum(ranks.gather(len(groups))) - config.rollout.prompts_per_step
            if scorer.threshold is not None:  # that this step was scored by
                metrics["threshold"] = scorer.threshold
                scorer.observe([pair for share in ranks.gather(group_means(rewards)) for pair in share])
            if run:
                run.log(metrics)
                if warning:
                    run.warn(step + 1, warning)
                bar.set_postfix_str(f"reward {metrics['reward']:.3f}, IoU {metrics['iou']:.3f}")
            skipped = skipped + 1 if updated["skipped_updates"] else 0
            parts = ["skipped"] if skipped else []
            if (step + 1) % config.samples_every == 0 or step in (0, config.steps - 1) or warning:
                parts.append("samples")
            if parts:
                shares = ranks.gather(sample_rows(groups, answers, rewards, advantages))
                rows = [row for share in shares for row in share]
                for part in parts:
                    if run:
                        run.write_rows(f"{part}/step-{step + 1:06d}.jsonl", rows)
            if skipped > config.optimizer.max_skipped:
                raise DivergedError(
                    f"optimizer.max_skipped: gradients were not finite in {skipped} steps in a row, up to step "
                    f"{step + 1}; {config.out}/skipped has their completions"
                )
            start = time.perf_counter()
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
                checkpoints.save(
                    step + 1, policy, optimizer, {"skipped": skipped} | scorer.state() | rewards_watch.state()
                )
                saved = step + 1
            saving = time.perf_counter() - start
        checkpoints.wait()
    except InterruptedRun as signal:
        ranks.progress.now("checkpoint", f"step {step}")
        if step > saved:
            checkpoints.save(step, policy, optimizer, {"skipped": skipped} | scorer.state() | rewards_watch.state())
        checkpoints.wait()
        if ranks.is_first:
            print(f"medground: {signal}: ended after {step} of {config.steps} steps; --resume goes on", file=sys.stderr)
        return False
    return True


def _audit_rewards(
    scorer: Scorer, make: PromptMaker, splits: Splits, config: Config, ranks: Ranks, run: RunFolder | None
) -> None:
    """Try the reward on a few degenerate answers, once a run, and say which of them it pays for.

    Raises:
        SharedError: a reward of the user's own failed.
    """
    ranks.progress.now("audit")
    fresh = run and not run.has("audit/rewards.json")
    found = ranks.together(
        lambda: brief_audit(scorer, make, splits.train, config.reward, config.seed) if fresh else None
    )
    if run and found:
        run.write_json("audit/rewards.json", found)
        for line in warnings_of(found):
            print(f"medground: {line}", file=sys.stderr)


class DivergedError(RuntimeError):
    """Gradients are not finite, again and again; raised on every rank."""


class Earned(NamedTuple):
    """Groups of this rank, what their completions say and earned, and how they were sampled."""

    groups: list[Group]
    answers: list[list[Answer]]
    rewards: Rewards
    rollout: RolloutStats


def _earn(asker: Asker, scorer: Scorer, order: DataOrder, prompts: Sequence[Prompt], step: int, clock: Clock) -> Earned:
    """Ask and score; with `loss.resample_prompts`, ask about others, too, where a group has no spread."""
    config, ranks = asker.config, asker.ranks
    left, B = config.loss.resample_prompts, config.rollout.prompts_per_step
    spare = spare_questions(order, step, B, left)
    asker.whole.refresh()
    earned = newest = _ask(asker, scorer, prompts, step, clock)
    assert earned, "every rank has prompts"
    while left:
        missing = int((~newest.rewards.spread).sum()) if newest else 0
        questions = list(islice(spare, min(left, sum(ranks.gather(missing)))))  # the same on every rank
        if not questions:
            break
        left -= len(questions)
        with closing(asker.loader(questions[ranks.rank :: ranks.size])) as coming:
            more = list(coming)
        clock.lap("data")
        newest = _ask(asker, scorer, more, step, clock)
        if newest:
            earned = Earned(
                earned.groups + newest.groups,
                earned.answers + newest.answers,
                earned.rewards.and_of(newest.rewards),
                earned.rollout.and_of(newest.rollout),
            )
    return earned


def _ask(asker: Asker, scorer: Scorer, prompts: Sequence[Prompt], step: int, clock: Clock) -> Earned | None:
    """What comes of some prompts; None where this rank has none, while others have."""
    groups = _roll_out(asker, prompts, step)
    clock.lap("prefill", asker.engine.stats.prefill_seconds)
    clock.lap("decode")
    if not groups:
        return None
    answers = [[read_answer(r.text, g.prompt) for r in g.rollouts] for g in groups]
    rewards = scorer(groups, answers)
    clock.lap("reward")
    return Earned(groups, answers, rewards, asker.engine.stats)


def _roll_out(asker: Asker, prompts: Sequence[Prompt], step: int) -> list[Group]:
    """The completions of this rank's prompts, in their order.

    Raises:
        InterruptedRun: a signal asked some rank to end.
    """
    r, first = asker.config.rollout, asker.ranks.is_first
    asker.ranks.progress.now("rollout", f"step {step + 1}: {len(prompts)} prompts, {r.group_size} completions of each")
    with tqdm(total=len(prompts) * r.group_size, desc="rollout", disable=not first, leave=False) as bar:
        found = asker.engine.roll_out(
            prompts,
            count=len(prompts),
            copies=r.group_size,
            sampling=Sampling(r.temperature, r.top_k, r.top_p),
            seed=asker.config.seed,
            step=step,
            bar=bar,
            stop=asker.stop,
        )
        groups = [group for _, group in sorted(found, key=lambda pair: pair[0])]
    asker.interruption.agree(asker.ranks)
    return groups


@dataclass
class MicroBatch:
    """Groups that go through the network together, with what the loss needs of each sequence and token.

    Attributes:
        packed: S sequences, N scored tokens.
        advantages: float32 [S].
        sampled_logp: float32 [N], as they came with the tokens.
        counts: False where this rank has no groups left while others have; it runs along and trains on nothing.
        tokens: of the N, those that are trained on.
        old_logp: float32 [N], of the old policy; None for the policy as it is.
        ref_logp: float32 [N], of the reference policy, if there is one.
    """

    packed: Packed
    advantages: Tensor
    sampled_logp: Tensor
    counts: bool
    tokens: int
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None

    @property
    def shapes(self) -> str:
        """What it takes, in words."""
        tokens, images = len(self.packed.input_ids), len(self.packed.image_grids)
        S, N = len(self.advantages), len(self.packed.targets)
        return f"a micro-batch of {tokens} tokens, {images} images, {S} completions of {N} tokens in all"


def _micro_batches(
    policy: Policy,
    groups: Sequence[Group],
    advantages: Tensor,
    config: Config,
    ranks: Ranks,
    kept: Tensor | None = None,
) -> list[MicroBatch]:
    """Deal all ranks' groups out, evenly by work: how they are cut and dealt changes nothing.

    Of groups, advantages and `kept` [B, G] (None for all) those of which nothing is kept go no further.
    """
    kept = torch.ones_like(advantages, dtype=torch.bool) if kept is None else kept
    everything = list(zip(groups, advantages, kept, strict=True))
    own = [item for item in everything if item[2].any()]
    if not ranks.any(bool(own)):  # nothing to learn from: all run along, since ranks must stay in step
        own = everything
    budget, patch_cost, vlm = config.loss.micro_batch_tokens, policy.patch_cost, policy.vlm.config
    loads = []
    for group, _, _ in own:
        tokens = len(group.prompt.input_ids) + sum(len(r.tokens) for r in group.rollouts)
        loads.append(Load(tokens, tokens + patch_cost * len(group.prompt.pixel_values)))
    dealt = deal(ranks.gather(loads), budget)
    mine = [place for places in dealt[ranks.rank] for place in places]
    outgoing = [
        (rank, own[place.number])
        for rank, cuts in enumerate(dealt)
        for place in (place for places in cuts for place in places)
        if place.home == ranks.rank != rank
    ]
    coming = [place for place in mine if place.home != ranks.rank]
    moved = dict(zip(coming, ranks.exchange(outgoing, [place.home for place in coming]), strict=True))
    held = {p: moved[p] if p in moved else own[p.number] for p in mine}
    smallest = min(held.values() or everything, key=lambda item: sum(len(r.tokens) for r in item[0].rollouts))
    return [
        _micro_batch([held[place] for place in places], smallest, vlm, ranks.device) for places in dealt[ranks.rank]
    ]


def _micro_batch(
    items: Sequence[tuple[Group, Tensor, Tensor]],
    spare: tuple[Group, Tensor, Tensor],
    vlm: Qwen2_5_VLConfig,
    device: torch.device,
) -> MicroBatch:
    """Groups with their advantages [G] and which completions take part [G]; `spare` where there are none."""
    chunk, advantages, kept = zip(*(items or [spare]), strict=True)
    packed = pack(chunk, vlm, device)
    lengths = torch.tensor([len(r.tokens) for group in chunk for r in group.rollouts])
    here = torch.cat(kept).repeat_interleave(lengths)  # [N]
    if not here.all():
        # a negative target takes no part in the loss
        packed = packed._replace(targets=packed.targets.masked_fill(~here.to(device), -1))
    return MicroBatch(
        packed=packed,
        advantages=torch.cat(advantages).to(device),
        sampled_logp=torch.cat([r.logp for g in chunk for r in g.rollouts]).to(device),
        counts=bool(items),
        tokens=int(here.sum()),
    )


def _scorings(config: Config) -> int:
    """Forward passes that `_score` makes of each micro-batch."""
    old = config.rollout.old_logp == "rescored" and config.loss.inner_epochs > 1
    return int(old) + int(config.loss.beta > 0)


@torch.no_grad()
def _score(policy: Policy, reference: Score | None, micro: Sequence[MicroBatch], config: Config) -> None:
    """Log-probabilities of the old and of the reference policy, where those at hand won't do."""
    T, rescored = config.rollout.temperature, config.rollout.old_logp == "rescored"
    for batch in micro:
        if not rescored:
            batch.old_logp = batch.sampled_logp
        elif config.loss.inner_epochs > 1:  # else the policy that is trained is the old one
            batch.old_logp = policy(batch.packed, T).logp
        if reference:
            batch.ref_logp = reference(batch.packed, T).logp


def _update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    micro: Sequence[MicroBatch],
    totals: Totals,
    config: Config,
    ranks: Ranks,
    step: int,
    clock: Clock,
) -> dict[str, float]:
    """`inner_epochs` optimizer steps on this rank's micro-batches; one whose gradient is not finite is left out."""
    options = config.loss.options(
        temperature=config.rollout.temperature, max_completion_length=config.rollout.max_new_tokens
    )
    lr = _learning_rate(config, step)
    set_learning_rate(optimizer, lr)

    stats, losses, norms, gaps, skipped = [], [], [], [], 0
    for epoch in range(config.loss.inner_epochs):
        for i, batch in enumerate(micro):
            ranks.progress.now("update", f"step {step + 1}: {batch.shapes}")
            reduce_gradients(policy, last=i + 1 == len(micro), each=config.sharding.reduce == "each")
            # dapo and cispo are normalised by all tokens already, the others by the sequences of this micro-batch
            share = 1.0 if options.loss_type in ("dapo", "cispo") else len(batch.advantages) / totals.sequences
            bonus = options.entropy_coef * batch.tokens / totals.tokens / share  # a mean over this batch
            loss, stat, logp = policy.loss(
                batch.packed,
                batch.advantages,
                old_logp=batch.old_logp,
                ref_logp=batch.ref_logp,
                options=replace(options, entropy_coef=bonus),
                total_tokens=totals.tokens,
            )
            share *= batch.counts
            (loss * share * ranks.size).backward()  # FSDP2 averages over the ranks; we want the sum
            if batch.counts:
                losses.append(loss.detach() * share)
                stats.append(stat)
                if not epoch:
                    gap = logp - batch.sampled_logp
                    gaps.append(gap if batch.tokens == len(gap) else gap[batch.packed.targets >= 0])
        clock.lap("update")
        ranks.progress.now("optimizer", f"step {step + 1}")
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer.max_grad_norm)
        norms.append(norm.full_tensor())  # type: ignore[attr-defined]  # a DTensor under FSDP2
        if norms[-1].isfinite():  # on every rank alike
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
        clock.lap("optimizer")
    statistics = update_statistics(stats, losses, norms, gaps, config.loss.inner_epochs, ranks)
    return statistics | {"lr": lr, "skipped_updates": skipped}


def _learning_rate(config: Config, step: int) -> float:
    o = config.optimizer
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    left = (config.steps - 1 - step) / max(config.steps - 1 - o.warmup_steps, 1)
    return o.lr * (o.final_lr_fraction + (1 - o.final_lr_fraction) * left)


if __name__ == "__main__":
    from medground.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
