"""A step of one rank for `bench.zero`, and those who update on it: our loop, and FSDP2 on the rows of other trainers.

Every side begins with the same weights, keeps its share of them, and says after each update what the loss and the
gradient's norm were over all ranks. DeepSpeed's is in `zero_deepspeed`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.random_model import (
    ARCHITECTURES,
    SIZES,
    Size,
    make_config,
    make_groups,
    make_processor,
    make_prompts,
    make_vlm,
)
from bench.unpacked import Rows, pad_rows, unpacked_logp
from medground import train
from medground.activation_checkpointing import checkpoint_activations
from medground.build import build_optimizer
from medground.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RolloutConfig
from medground.policy import Policy
from medground.records import Group
from medground.sharding import Ranks, compute_dtype, shard
from medground.step_metrics import Clock, Totals

LR = 1e-4  # large enough for the second update's loss to tell whether the first one was right
OLD_GAP = 0.1  # nats, root mean square, between the old policy's log-probabilities and those of the first weights


class Update(NamedTuple):
    """Of one update, over all ranks: the loss, and the gradient's norm before it was clipped."""

    loss: float
    grad_norm: float


class Side(Protocol):
    """Weights and optimizer of one way to train."""

    def update(self) -> Update:
        """Forward and backward pass of every micro-batch, clipping, AdamW; all ranks must call it."""


class RowBatch(NamedTuple):
    """Groups as padded rows, N scored tokens.

    Attributes:
        rows: what goes through the network.
        advantages: float32 [N].
        old_logp: float32 [N].
    """

    rows: Rows
    advantages: Tensor
    old_logp: Tensor


class Work(NamedTuple):
    """One rank's share of a step, taken over and over again.

    Attributes:
        model: name of the architecture.
        size: of prompts and completions.
        config: as our loop takes it; the others read learning rate, clipping and the like from it.
        totals: over all ranks.
        packed: micro-batches of our loop.
        rows: the same groups in micro-batches of padded rows.
    """

    model: str
    size: Size
    config: Config
    totals: Totals
    packed: list[train.MicroBatch]
    rows: list[RowBatch]


def make_work(model: str, ranks: Ranks, prompts: int, groups_at_once: int, checkpointing: bool) -> Work:
    """A step of `prompts` prompts a rank; it is the same whichever way as many prompts are shared out."""
    if prompts % groups_at_once:
        raise ValueError(f"want prompts a multiple of groups at once; got {prompts}, {groups_at_once}")
    shape, size, count = ARCHITECTURES[model], SIZES[model], prompts * ranks.size
    P, _, G, C = size
    vlm = _make_vlm(model, ranks)
    generator = torch.Generator().manual_seed(1)
    advantages, noise = torch.randn(count, G, generator=generator), torch.randn(count, G, C, generator=generator)
    mine = slice(ranks.rank * prompts, (ranks.rank + 1) * prompts)
    groups = make_groups(make_prompts(make_processor(shape.V, size), size, count), shape.V, size)[mine]
    groups, advantages = _with_old_logp(vlm, groups, OLD_GAP * noise[mine]), advantages[mine]
    config = Config(
        out="unused",
        steps=1000,
        model=ModelConfig(path="unused", activation_checkpointing="full" if checkpointing else "none"),
        data=DataConfig(path=("unused",)),
        rollout=RolloutConfig(prompts_per_step=count, group_size=G, max_new_tokens=C),
        loss=LossConfig(loss_type="dapo", beta=0.0, micro_batch_tokens=groups_at_once * (P + G * C)),
        optimizer=OptimizerConfig(lr=LR, warmup_steps=0, final_lr_fraction=1.0),
    )
    chunks = [slice(start, start + groups_at_once) for start in range(0, prompts, groups_at_once)]
    rows = [_row_batch(vlm, groups[chunk], advantages[chunk]) for chunk in chunks]
    policy = Policy(vlm)
    packed = train._micro_batches(policy, groups, advantages, config, ranks)
    train._score(policy, None, packed, config)
    return Work(model, size, config, Totals(count * G * C, count * G, {}), packed, rows)


def _make_vlm(model: str, ranks: Ranks) -> Qwen2_5_VLForConditionalGeneration:
    shape = ARCHITECTURES[model]
    config = make_config(shape, make_processor(shape.V, SIZES[model]))
    return make_vlm(config, ranks.device, compute_dtype(ranks, "auto"))


@torch.no_grad()
def _with_old_logp(vlm: Qwen2_5_VLForConditionalGeneration, groups: Sequence[Group], gap: Tensor) -> list[Group]:
    """Groups as if sampled by an old policy whose log-probabilities are `gap` [B, G, C] above those of the weights."""
    found = []
    for group, off in zip(groups, gap, strict=True):
        rows = pad_rows([group], vlm.config.image_token_id, vlm.device)
        old = unpacked_logp(vlm, rows, 1.0).cpu().view_as(off) + off
        rollouts = (replace(rollout, logp=logp) for rollout, logp in zip(group.rollouts, old, strict=True))
        found.append(replace(group, rollouts=tuple(rollouts)))
    return found


def _row_batch(vlm: Qwen2_5_VLForConditionalGeneration, groups: Sequence[Group], advantages: Tensor) -> RowBatch:
    rows = pad_rows(groups, vlm.config.image_token_id, vlm.device)
    logps = [rollout.logp for group in groups for rollout in group.rollouts]
    lengths = torch.tensor([len(logp) for logp in logps])
    spread = advantages.flatten().repeat_interleave(lengths)
    return RowBatch(rows, spread.to(vlm.device), torch.cat(logps).to(vlm.device))


def master_weights(work: Work, ranks: Ranks) -> Qwen2_5_VLForConditionalGeneration:
    """The model in float32, ready to be trained, its numbers rounded to the compute dtype."""
    vlm = _make_vlm(work.model, ranks).float().train()
    checkpoint_activations(vlm, work.config.model.activation_checkpointing)
    return vlm


def over_ranks(losses: Sequence[Tensor], ranks: Ranks) -> float:
    """The loss, from each rank's shares."""
    return sum(ranks.gather(float(torch.stack(list(losses)).sum())))


class Ours:
    """Packed groups under FSDP2: the functions of `medground.train`."""

    def __init__(self, work: Work, ranks: Ranks):
        self.work, self.ranks = work, ranks
        self.policy = shard(Policy(master_weights(work, ranks)), ranks, "auto")
        self.optimizer = build_optimizer(self.policy, work.config)

    def update(self) -> Update:
        work = self.work
        found = train._update(
            self.policy, self.optimizer, work.packed, work.totals, work.config, self.ranks, step=0, clock=Clock()
        )
        return Update(found["loss"], found["grad_norm"])


class RowsLoss(nn.Module):
    """The GRPO loss as trainers of padded rows compute it: logits of every token, the prompt's too, and log_softmax."""

    def __init__(self, work: Work, ranks: Ranks):
        super().__init__()
        self.vlm = master_weights(work, ranks)
        self.options = work.config.loss.options(temperature=1.0, max_completion_length=work.size.C)
        self.total_tokens = work.totals.tokens

    def forward(self, batch: RowBatch) -> Tensor:
        """DeepSpeed calls this one; `shard` wants a method `loss`."""
        return self.loss(batch)

    def loss(self, batch: RowBatch) -> Tensor:
        """A micro-batch's share of the loss."""
        logits = self.vlm(**batch.rows.inputs, use_cache=False).logits  # [S, T, V]
        following = batch.rows.inputs["input_ids"].roll(-1, 1)
        # row by row and in the logits' dtype, as VLM-R1 has it
        logp = [row.log_softmax(-1).gather(-1, y[:, None])[:, 0] for row, y in zip(logits, following, strict=True)]
        ratio = (torch.cat(logp)[batch.rows.scored].float() - batch.old_logp).exp()
        clipped = ratio.clamp(1 - self.options.epsilon_low, 1 + self.options.epsilon_high)
        return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).sum() / self.total_tokens


class OursUnpacked:
    """The rows under our FSDP2: what is the packing's and what the engine's can be told apart."""

    def __init__(self, work: Work, ranks: Ranks):
        self.work, self.ranks = work, ranks
        self.model = shard(RowsLoss(work, ranks), ranks, "auto")
        self.optimizer = build_optimizer(self.model, work.config)

    def update(self) -> Update:
        losses, batches = [], self.work.rows
        for i, batch in enumerate(batches):
            self.model.set_requires_gradient_sync(i + 1 == len(batches))
            loss = self.model.loss(batch)
            (loss * self.ranks.size).backward()  # FSDP2 averages over the ranks; we want the sum
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.work.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Update(over_ranks(losses, self.ranks), norm.full_tensor().item())
