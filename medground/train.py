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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from medground.adamw import need_torchao, set_learning_rate
from medground.build import Score, build_optimizer, build_policy, build_reference
from medground.checkpoint import export_policy, load_checkpoint, save_checkpoint
from medground.config import Config, differing_fields
from medground.costs import network_of, peak_of, sizes_of, step_operations
from medground.datasets.manifest import load_records, records_hash, select
from medground.evaluate import Asker, read_answer
from medground.lora import need_peft
from medground.micro_batches import Load, deal
from medground.packing import Packed, pack
from medground.policy import Policy, check_model
from medground.prompts import Processor, load_processor, prompt_tokens
from medground.records import Example, Group, Prompt
from medground.report.page import write_report
from medground.rewards.total import score_answers
from medground.rollout.cache import Sampling
from medground.rollout.engine import Engine, Limits, plan_cache
from medground.run_folder import RunFolder, check_folder, environment
from medground.sharding import Ranks, SharedError, WholeCopy, compute_dtype, join_ranks, reduce_gradients
from medground.step_metrics import Clock, Totals, sample_rows, step_totals, update_statistics
from medground.summary import Splits, evaluate_curve, evaluate_test, summarise
from medground_kernels.group_advantage import group_advantage
from medground_kernels.varlen_attention import backend_name


def train(config: Config) -> None:
    """Train, evaluate and export as `config` says.

    Raises:
        ValueError: the configuration, the data, the model or the folder is not usable; raised on
            every rank, before the first step.
    """
    started = time.perf_counter()
    with join_ranks() as ranks:
        splits, data_hash, model_folder, processor, limits = _check(config, ranks)
        asked, config = config, config.in_steps(len(splits.train))
        ranks = ranks.arranged(config.sharding.replicas)
        policy = build_policy(model_folder, config, ranks)
        reference = build_reference(policy, model_folder, config, ranks)
        optimizer = build_optimizer(policy, config)
        whole = WholeCopy(policy, ranks, config.model.precision)
        if config.model.compile:
            whole.policy.compile_layers()
        engine = Engine(whole.policy, processor.tokenizer, limits)
        asker = Asker(policy, whole, engine, processor, config, ranks)
        if ranks.is_first:
            half = whole.policy.vlm.dtype != torch.float32
            print(f"attention: {backend_name(ranks.device if half else 'cpu')}")

        done = load_checkpoint(Path(config.out) / "checkpoints", policy, optimizer) if config.resume else 0
        facts = environment(ranks.size, config.seed, data_hash, config.model.path)
        run = RunFolder(asked, facts) if ranks.is_first else None
        if run:
            run.start(done)
        if not done:
            evaluate_test(asker, splits, run, step=0)
        _steps(asker, reference, optimizer, splits, run, done)
        # a run may have been stopped after its last checkpoint, within its last evaluation
        last_written = Path(config.out) / "eval" / f"step-{config.steps:06d}.curve.json"
        if done < config.steps or not ranks.gather(last_written.exists())[0]:
            evaluate_test(asker, splits, run, step=config.steps)
        export_policy(Path(config.out) / "export", policy, model_folder, ranks, config.model.path)
        if run:
            with closing(run):
                run.write_json("summary.json", summarise(config, splits, run, facts, time.perf_counter() - started))
            write_report(run.path, Path(config.data.path), run.path / "report.html")


def _steps(
    asker: Asker,
    reference: Score | None,
    optimizer: torch.optim.Optimizer,
    splits: Splits,
    run: RunFolder | None,
    done: int,
) -> None:
    """Every step from `done` on."""
    config, ranks, policy = asker.config, asker.ranks, asker.policy
    batches = _batches(asker, splits.train, done)
    bar = tqdm(range(done, config.steps), initial=done, total=config.steps, desc="GRPO", disable=not ranks.is_first)
    network, peak = network_of(policy), peak_of(ranks, compute_dtype(ranks, config.model.precision))
    saving = 0.0
    for step in bar:
        clock = Clock(saving, peak)
        prompts = next(batches)
        clock.lap("data")

        groups = _roll_out(asker, prompts, step)
        clock.lap("prefill", asker.engine.stats.prefill_seconds)
        clock.lap("decode")

        answers = [[read_answer(r.text, g.prompt) for r in g.rollouts] for g in groups]
        rewards = score_answers(answers, [g.prompt.example.boxes for g in groups], config.reward)
        advantages = group_advantage(rewards.total, normalize=config.loss.advantage)  # [B, G]
        clock.lap("reward")

        work = step_operations(network, sizes_of(groups), scorings=_scorings(config), epochs=config.loss.inner_epochs)
        totals = step_totals(groups, rewards, asker.engine.stats, work, ranks)
        micro = _micro_batches(policy, groups, advantages, config, ranks)
        _score(policy, reference, micro, config)
        clock.lap("score")

        updated = _update(policy, optimizer, micro, totals, config, ranks, step, clock)
        clock.lap("update")

        metrics = {"step": step + 1} | totals.means | updated | clock.seconds(totals)
        if run:
            run.log(metrics)
            bar.set_postfix_str(f"reward {metrics['reward']:.3f}, IoU {metrics['iou']:.3f}")
        if (step + 1) % config.samples_every == 0 or step in (0, config.steps - 1):
            shares = ranks.gather(sample_rows(groups, answers, rewards, advantages))
            if run:
                run.write_rows(f"samples/step-{step + 1:06d}.jsonl", (row for share in shares for row in share))
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0 and step + 1 < config.steps:
            evaluate_curve(asker, splits, run, step + 1)
        start = time.perf_counter()
        if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
            folder = Path(config.out) / "checkpoints"
            save_checkpoint(folder, step + 1, policy, optimizer, ranks, config.checkpoint.keep)
        saving = time.perf_counter() - start


def _roll_out(asker: Asker, prompts: Sequence[Prompt], step: int) -> list[Group]:
    """The completions of this rank's prompts, in their order."""
    r, first = asker.config.rollout, asker.ranks.is_first
    asker.whole.refresh()
    with tqdm(total=len(prompts) * r.group_size, desc="rollout", disable=not first, leave=False) as bar:
        found = asker.engine.roll_out(
            prompts,
            count=len(prompts),
            copies=r.group_size,
            sampling=Sampling(r.temperature, r.top_k, r.top_p),
            seed=asker.config.seed,
            step=step,
            bar=bar,
        )
        return [group for _, group in sorted(found, key=lambda pair: pair[0])]


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


@dataclass
class MicroBatch:
    """Groups that go through the network together, with what the loss needs of each sequence and token.

    Attributes:
        packed: S sequences, N scored tokens.
        advantages: float32 [S].
        sampled_logp: float32 [N], as they came with the tokens.
        counts: False where this rank has no groups left while others have; it runs along and trains on nothing.
        old_logp: float32 [N], of the old policy; None for the policy as it is.
        ref_logp: float32 [N], of the reference policy, if there is one.
    """

    packed: Packed
    advantages: Tensor
    sampled_logp: Tensor
    counts: bool
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None


def _micro_batches(
    policy: Policy, groups: Sequence[Group], advantages: Tensor, config: Config, ranks: Ranks
) -> list[MicroBatch]:
    """Deal all ranks' groups out, evenly by work: how they are cut and dealt changes nothing."""
    budget, patch_cost, vlm = config.loss.micro_batch_tokens, policy.patch_cost, policy.vlm.config
    loads = []
    for group in groups:
        tokens = len(group.prompt.input_ids) + sum(len(r.tokens) for r in group.rollouts)
        loads.append(Load(tokens, tokens + patch_cost * len(group.prompt.pixel_values)))
    dealt = deal(ranks.gather(loads), budget)
    mine = [place for places in dealt[ranks.rank] for place in places]
    outgoing = [
        (rank, (groups[place.number], advantages[place.number]))
        for rank, cuts in enumerate(dealt)
        for place in (place for places in cuts for place in places)
        if place.home == ranks.rank != rank
    ]
    coming = [place for place in mine if place.home != ranks.rank]
    moved = dict(zip(coming, ranks.exchange(outgoing, [place.home for place in coming]), strict=True))
    held = {p: moved[p] if p in moved else (groups[p.number], advantages[p.number]) for p in mine}
    smallest = min(held.values(), key=lambda item: sum(len(r.tokens) for r in item[0].rollouts))
    micro = []
    for places in dealt[ranks.rank]:
        items = [held[place] for place in places] or [smallest]
        chunk = [group for group, _ in items]
        micro.append(
            MicroBatch(
                packed=pack(chunk, vlm, ranks.device),
                advantages=torch.cat([advantage for _, advantage in items]).to(ranks.device),
                sampled_logp=torch.cat([r.logp for g in chunk for r in g.rollouts]).to(ranks.device),
                counts=bool(places),
            )
        )
    return micro


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
    """`inner_epochs` optimizer steps on this rank's micro-batches."""
    options = config.loss.options(
        temperature=config.rollout.temperature, max_completion_length=config.rollout.max_new_tokens
    )
    lr = _learning_rate(config, step)
    set_learning_rate(optimizer, lr)

    stats, losses, norms, gaps = [], [], [], []
    for epoch in range(config.loss.inner_epochs):
        for i, batch in enumerate(micro):
            reduce_gradients(policy, last=i + 1 == len(micro), each=config.sharding.reduce == "each")
            # dapo and cispo are normalised by all tokens already, the others by the sequences of this micro-batch
            share = 1.0 if options.loss_type in ("dapo", "cispo") else len(batch.advantages) / totals.sequences
            bonus = options.entropy_coef * len(batch.packed.targets) / totals.tokens / share  # a mean over this batch
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
                    gaps.append(logp - batch.sampled_logp)
        clock.lap("update")
        limit = config.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), limit, error_if_nonfinite=True)
        norms.append(norm.full_tensor())  # type: ignore[attr-defined]  # a DTensor under FSDP2
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("optimizer")
    return update_statistics(stats, losses, norms, gaps, config.loss.inner_epochs, ranks) | {"lr": lr}


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


def _check(config: Config, ranks: Ranks) -> tuple[Splits, str, Path, Processor, Limits]:
    """Everything a user may have got wrong, before any work: the same answer on every rank."""
    first, *others = ranks.gather(config)
    for rank, other in enumerate(others, 1):
        if differing := differing_fields(first, other):
            raise SharedError(f"rank {rank} was started with another configuration than rank 0: {'; '.join(differing)}")
    B = config.rollout.prompts_per_step
    if B % ranks.size:
        raise SharedError(f"rollout.prompts_per_step: want a multiple of the {ranks.size} ranks; got {B}")

    def check() -> tuple[Splits, str, Path, Processor, Limits]:
        ranks.replicas(config.sharding.replicas)
        records = load_records(config.data.path)
        data_hash = records_hash(config.data.path)
        check_folder(config, data_hash)
        model_folder = _model_folder(config.model.path)
        check_model(model_folder)
        if config.model.lora.rank:
            need_peft()
        if config.optimizer.kind == "adamw-8bit":
            need_torchao()
        processor = load_processor(model_folder, config.data.min_pixels, config.data.max_pixels)
        names = (config.data.train_split, config.data.curve_split, config.data.test_split)
        train, curve, test = (select(records, name, config.data.path) for name in names)
        if not any(example.boxes for example in train):
            raise ValueError(f"{config.data.path}: want a record with a box in split {names[0]!r}; got none")
        if len({example.patient for example in test}) < 2:
            raise ValueError(f"{config.data.path}: want two patients or more in split {names[2]!r} (shuffled images)")
        splits = Splits(train, curve[: config.evaluation.curve_records], test)
        examples = [example for split in splits for example in split]
        limits = _limits(config, examples, processor, model_folder, compute_dtype(ranks, config.model.precision))
        return splits, data_hash, model_folder, processor, limits

    return ranks.together(check)


def _limits(
    config: Config, examples: Sequence[Example], processor: Processor, model_folder: Path, dtype: torch.dtype
) -> Limits:
    """What decoding and training need, once it is certain that every prompt fits with its completions."""
    tokens = {example.id: prompt_tokens(example, processor, config.prompt.template) for example in examples}
    wordy, large = max(tokens, key=lambda name: tokens[name][0]), max(tokens, key=lambda name: tokens[name][1])
    P = tokens[wordy][0] + tokens[large][1]  # evaluation shows a phrase with other records' images as well
    told = (
        f"the longest text takes {tokens[wordy][0]} tokens (record {wordy}), "
        f"the largest image {tokens[large][1]} (record {large})"
    )
    text = AutoConfig.from_pretrained(model_folder, trust_remote_code=False).text_config
    r = config.rollout
    if P + r.max_new_tokens > text.max_position_embeddings:
        raise ValueError(
            f"data.max_pixels, rollout.max_new_tokens: want a prompt and {r.max_new_tokens} new tokens within the "
            f"model's context of {text.max_position_embeddings} tokens; {told}"
        )
    group = P + r.group_size * r.max_new_tokens
    if group > config.loss.micro_batch_tokens:
        raise ValueError(
            f"loss.micro_batch_tokens: want at least {group}, a prompt and {r.group_size} completions of "
            f"{r.max_new_tokens} tokens; got {config.loss.micro_batch_tokens}; {told}"
        )
    limits = Limits(P, r.max_new_tokens, r.max_rows, r.cache_gb * 1e9, r.prefill_tokens)
    try:
        plan_cache(text, dtype, limits, prompts=1, copies=1)
    except ValueError as error:
        raise ValueError(f"{error}; {told}") from None
    return limits


def _model_folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"model.path: want a model folder or a name on the hub; got {path!r}: {error}") from None


if __name__ == "__main__":
    from medground.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
