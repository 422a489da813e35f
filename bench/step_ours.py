"""Our side of `bench.steps`: the functions of `medground.train`, in its order.

But that prompts are made within the step, not beside the one before, so that all sides read their images on the clock.
"""

import functools
import gc
import shutil
import time
from contextlib import closing
from pathlib import Path

import torch

from bench.random_model import TEMPLATE
from bench.step_job import LR, NO_LIMIT, PHASES, SEED, Capture, Job, Seconds, reward
from medground import train
from medground.build import build_optimizer, build_policy
from medground.checkpoint import Checkpoints
from medground.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RolloutConfig,
)
from medground.costs import network_of, peak_of, sizes_of, step_operations
from medground.evaluate import Asker
from medground.loading import Loader, PromptMaker, Question
from medground.preflight import limits_of
from medground.prompts import load_processor
from medground.records import Group, Prompt, Rollout
from medground.rewards.total import Rewards
from medground.rollout.engine import Engine
from medground.sharding import Ranks, WholeCopy, compute_dtype
from medground.step_metrics import Clock, step_totals
from medground_kernels.group_advantage import group_advantage

_STATE_BYTES = 12  # a weight and AdamW's two moments, float32


def make_our_config(job: Job) -> Config:
    P, _, G, C = job.size
    work = job.workload
    return Config(
        out="unused",
        steps=1000,
        seed=SEED,
        model=ModelConfig(
            path=str(job.model), activation_checkpointing="full" if work.checkpointing else "none", lora=job.lora
        ),
        data=DataConfig(path=(str(job.data),), min_pixels=job.pixels, max_pixels=job.pixels),
        prompt=PromptConfig(template=TEMPLATE),
        rollout=RolloutConfig(prompts_per_step=len(job.examples), group_size=G, max_new_tokens=C),
        loss=LossConfig(loss_type="dapo", beta=0.0, micro_batch_tokens=work.groups_at_once * (P + G * C)),
        optimizer=OptimizerConfig(lr=LR, warmup_steps=0, max_grad_norm=NO_LIMIT),
    )


class OurSide:
    """A policy, its optimizer and its engine, as `medground.train` sets them up.

    Attributes:
        metrics: of the last step, by the names that a run writes.
        groups: of the last step.
    """

    def __init__(self, job: Job, ranks: Ranks):
        self.job, self.ranks, self.config = job, ranks, make_our_config(job)
        config, dtype = self.config, compute_dtype(ranks, self.config.model.precision)
        processor = load_processor(job.model, config.data.min_pixels, config.data.max_pixels)
        limits = limits_of(config, job.examples, processor, job.model, dtype)
        policy = build_policy(job.model, config, ranks)
        self.optimizer = build_optimizer(policy, config)
        whole = WholeCopy(policy, ranks, config.model.precision)
        engine = Engine(whole.policy, processor.tokenizer, limits)
        make = PromptMaker(config.data.path, processor, config.prompt.template)
        self.asker = Asker(policy, whole, engine, Loader(make, workers=0, ahead=1), config, ranks)
        self.network, self._peak = network_of(policy), peak_of(ranks, dtype)
        self._roll_out = engine.roll_out
        self.steps = 0
        self.metrics: dict[str, float] = {}
        self.groups: list[Group] = []

    def step(self) -> Seconds:
        asker, config, ranks = self.asker, self.config, self.ranks
        lengths = {e.id: row for e, row in zip(self.job.examples, self.job.lengths(self.steps), strict=True)}

        def length(prompt: Prompt, index: int) -> int:
            return lengths[prompt.example.id][index]

        clock = Clock(peak=self._peak)
        prompts = [asker.loader.make(Question(example)) for example in self.job.examples]
        clock.lap("data")
        asker.engine.roll_out = functools.partial(self._roll_out, lengths=length)
        asker.whole.refresh()
        groups = train._roll_out(asker, prompts, self.steps)
        clock.lap("prefill", asker.engine.stats.prefill_seconds)
        clock.lap("decode")
        total = torch.tensor([[reward(r.text) for r in g.rollouts] for g in groups])
        rewards = Rewards(total, {}, {}, torch.zeros_like(total))
        advantages = group_advantage(total, normalize=config.loss.advantage)
        clock.lap("reward")
        work = step_operations(self.network, sizes_of(groups), scorings=train._scorings(config))
        totals = step_totals(groups, rewards, asker.engine.stats, work, ranks)
        micro = train._micro_batches(asker.policy, groups, advantages, config, ranks)
        train._score(asker.policy, None, micro, config)
        clock.lap("score")
        train._update(asker.policy, self.optimizer, micro, totals, config, ranks, self.steps, clock)
        clock.lap("update")
        self.steps += 1
        found = {g.prompt.example.id: [len(r.tokens) for r in g.rollouts] for g in groups}
        if found != lengths:
            raise ValueError(f"want completions of the lengths {lengths}; got {found}")
        self.groups, self.metrics = groups, totals.means | clock.seconds(totals)
        return {"step": self.metrics["seconds"]} | {phase: self.metrics[f"seconds_{phase}"] for phase in PHASES}

    def save(self, folder: Path) -> dict[str, float | None]:
        """Seconds that a checkpoint holds the loop up, and until it is written; None where the disk has no room."""
        trained = [weight for weight in self.asker.policy.parameters() if weight.requires_grad]
        needed = _STATE_BYTES * sum(weight.numel() for weight in trained)
        if shutil.disk_usage(folder.parent).free < 1.2 * needed:
            return {"checkpoint_stall_seconds": None, "checkpoint_seconds": None}
        stalls, wholes = [], []
        with closing(Checkpoints(folder, self.ranks, keep=1)) as checkpoints:
            for _ in range(2):  # the first one allocates its memory
                start = time.perf_counter()
                checkpoints.save(self.steps, self.asker.policy, self.optimizer, {})
                stalls.append(time.perf_counter() - start)
                checkpoints.wait()
                wholes.append(time.perf_counter() - start)
        return {"checkpoint_stall_seconds": stalls[-1], "checkpoint_seconds": wholes[-1]}

    def compare(self, theirs: Capture) -> float:
        """How far our gradient of their first step is from theirs: root mean square over theirs.

        In an adapter's first step that is the gradient of B, since that of A is zero while B is.
        """
        policy, config = self.asker.policy, self.config
        prompts = [self.asker.loader.make(Question(example)) for example in self.job.examples]
        if not torch.equal(torch.stack([prompt.input_ids for prompt in prompts]), theirs.prompts):
            raise ValueError("want the same prompts on both sides; theirs have other tokens")
        groups = [
            Group(prompt, tuple(Rollout(tokens, torch.zeros(len(tokens)), "", False) for tokens in completions))
            for prompt, completions in zip(prompts, theirs.completions, strict=True)
        ]
        options = config.loss.options(temperature=1.0, max_completion_length=self.job.size.C)
        tokens = sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
        for batch in train._micro_batches(policy, groups, theirs.advantages, config, self.ranks):
            policy.loss(
                batch.packed, batch.advantages, old_logp=None, ref_logp=None, options=options, total_tokens=tokens
            ).loss.backward()
        off = size = 0.0
        trained = {name: weight for name, weight in policy.vlm.named_parameters() if weight.requires_grad}
        if trained.keys() != theirs.grads.keys():
            one_sided = sorted(trained.keys() ^ theirs.grads.keys())
            raise ValueError(f"want the same weights trained on both sides; not so are {one_sided}")
        for name, weight in trained.items():
            grad = weight.grad.full_tensor().cpu()
            off += float((grad - theirs.grads[name]).double().square().sum())
            size += float(theirs.grads[name].double().square().sum())
        self.optimizer.zero_grad()
        return (off / size) ** 0.5

    def close(self) -> None:
        del self.asker, self.optimizer, self._roll_out
        self.groups = []
        gc.collect()
        torch.cuda.empty_cache()
