"""Our side of `bench.step_against_trl`: the functions of `medground.train`, in its order."""

import torch

from bench.random_model import TEMPLATE
from bench.step_job import LR, NO_LIMIT, Capture, Job, reward
from medground import train
from medground.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RolloutConfig,
)
from medground.evaluate import Asker
from medground.prompts import load_processor
from medground.records import Group, Rollout
from medground.rewards.total import Rewards
from medground.rollout.engine import Engine
from medground.sharding import Ranks, WholeCopy, compute_dtype, shard
from medground.step_metrics import Clock, step_totals
from medground_kernels.group_advantage import group_advantage


def make_our_config(job: Job) -> Config:
    P, _, G, C = job.size
    return Config(
        out="unused",
        steps=1000,
        model=ModelConfig(path=str(job.model), gradient_checkpointing=job.checkpointing),
        data=DataConfig(path=str(job.data), min_pixels=job.pixels, max_pixels=job.pixels),
        prompt=PromptConfig(template=TEMPLATE),
        rollout=RolloutConfig(prompts_per_step=len(job.examples), group_size=G, max_new_tokens=C),
        loss=LossConfig(loss_type="dapo", beta=0.0, micro_batch_tokens=job.groups_at_once * (P + G * C)),
        optimizer=OptimizerConfig(lr=LR, warmup_steps=0, max_grad_norm=NO_LIMIT),
    )


def coarse(s: dict[str, float]) -> dict[str, float]:
    """Seconds of a step by the phases that TRL's can be told apart by."""
    return {
        "step": s["seconds"],
        "rollout": s["seconds_prefill"] + s["seconds_decode"],
        "update": s["seconds_score"] + s["seconds_update"],
        "the rest": s["seconds_data"] + s["seconds_reward"],
    }


class OurSide:
    """A policy, its optimizer and its engine, as `medground.train` sets them up."""

    def __init__(self, job: Job, ranks: Ranks):
        self.job, self.ranks, self.config = job, ranks, make_our_config(job)
        config, dtype = self.config, compute_dtype(ranks, self.config.model.precision)
        processor = load_processor(job.model, config.data.min_pixels, config.data.max_pixels)
        limits = train._limits(config, job.examples, processor, job.model, dtype)
        policy = shard(train._load(job.model, config), ranks, config.model.precision)
        self.optimizer = train._optimizer(policy, config)
        whole = WholeCopy(policy, ranks, config.model.precision)
        engine = Engine(whole.policy, processor.tokenizer, limits)
        self.asker = Asker(policy, whole, engine, processor, config, ranks)
        self.steps = 0

    def step(self) -> dict[str, float]:
        """One step: its seconds, those of its phases, tokens a second (`Clock.seconds`)."""
        asker, config, ranks = self.asker, self.config, self.ranks
        clock = Clock()
        prompts = [asker.prompt(example) for example in self.job.examples]
        clock.lap("data")
        groups = train._roll_out(asker, prompts, self.steps)
        clock.lap("prefill", asker.engine.stats.prefill_seconds)
        clock.lap("decode")
        total = torch.tensor([[reward(r.text) for r in g.rollouts] for g in groups])
        rewards = Rewards(total, *(torch.zeros_like(total) for _ in range(3)))
        advantages = group_advantage(total, normalize=config.loss.advantage)
        clock.lap("reward")
        totals = step_totals(groups, rewards, asker.engine.stats, ranks)
        micro = train._micro_batches(asker.policy, groups, advantages, config, ranks)
        train._score(asker.policy, None, micro, config)
        clock.lap("score")
        train._update(asker.policy, self.optimizer, micro, totals, config, ranks, self.steps)
        clock.lap("update")
        self.steps += 1
        if {len(r.tokens) for g in groups for r in g.rollouts} != {self.job.size.C}:
            raise ValueError(f"want completions of {self.job.size.C} tokens; got {totals.means['completion_length']}")
        return clock.seconds(totals)

    def compare(self, theirs: Capture) -> float:
        """How far our gradient of their first step is from theirs: root mean square over theirs."""
        policy, config = self.asker.policy, self.config
        prompts = [self.asker.prompt(example) for example in self.job.examples]
        if not torch.equal(torch.stack([prompt.input_ids for prompt in prompts]), theirs.prompts):
            raise ValueError("want the same prompts on both sides; theirs have other tokens")
        groups = [
            Group(prompt, tuple(Rollout(tokens, torch.zeros(len(tokens)), "", False) for tokens in completions))
            for prompt, completions in zip(prompts, theirs.completions, strict=True)
        ]
        options = config.loss.options(temperature=1.0, max_completion_length=self.job.size.C)
        for batch in train._micro_batches(policy, groups, theirs.advantages, config, self.ranks):
            policy.loss(
                batch.packed, batch.advantages, old_logp=None, ref_logp=None, options=options,
                total_tokens=theirs.completions.numel()
            ).loss.backward()  # fmt: skip
        off = size = 0.0
        for name, weight in policy.vlm.named_parameters():
            grad = weight.grad.full_tensor().cpu()
            off += float((grad - theirs.grads[name]).double().square().sum())
            size += float(theirs.grads[name].double().square().sum())
        self.optimizer.zero_grad()
        return (off / size) ** 0.5
