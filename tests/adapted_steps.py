"""Steps of small models with adapters on uneven groups, as a module and under torchrun.

python -m torch.distributed.run --nproc-per-node 2 tests/adapted_steps.py FOLDER: rank 0 writes each variant's weights
and statistics to FOLDER/VARIANT.pt; a checkpoint of its second step is in FOLDER/VARIANT.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from stream_cases import policy_of, small_model
from torch import Tensor
from uneven_update import LARGEST, all_groups

from medground.checkpoint import load_checkpoint, save_checkpoint
from medground.config import Config, DataConfig, LoraConfig, LossConfig, ModelConfig, OptimizerConfig, RolloutConfig
from medground.policy import Policy
from medground.sharding import Ranks, WholeCopy, join_ranks, shard
from medground.step_metrics import Clock, Totals
from medground.train import _micro_batches, _optimizer, _score, _update

STEPS = 3
VARIANTS = {"untied": (False, True), "tied": (True, False)}
"""Whether head and embedding are one, whether activations are recomputed."""
CONFIG = Config(
    out="unused",
    steps=STEPS,
    model=ModelConfig(path="unused", lora=LoraConfig(rank=3, alpha=6)),
    data=DataConfig(path="unused"),
    rollout=RolloutConfig(group_size=4, max_new_tokens=40, old_logp="rescored"),
    loss=LossConfig(loss_type="dapo", beta=0.1, inner_epochs=2, micro_batch_tokens=LARGEST),
    optimizer=OptimizerConfig(lr=3e-4, warmup_steps=0, final_lr_fraction=1.0),
)


def adapted(variant: str, ranks: Ranks) -> Policy:
    tied, checkpointed = VARIANTS[variant]
    vlm = small_model()
    vlm.config.tie_word_embeddings = vlm.config.text_config.tie_word_embeddings = tied
    vlm.tie_weights()
    policy = policy_of(vlm)
    assert (policy.vlm.lm_head.weight is policy.vlm.model.language_model.embed_tokens.weight) == tied
    policy.add_adapters(CONFIG.model.lora, seed=1)
    if checkpointed:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    return shard(policy, ranks, "float32").train()


def run(variant: str, ranks: Ranks, folder: Path | None = None, resume: Path | None = None) -> dict[str, Tensor]:
    """All steps; adapters, the weights that decode and the last step's statistics, by name.

    Args:
        variant: of VARIANTS.
        ranks: each has its part of the groups, uneven on purpose.
        folder: for a checkpoint of the second step.
        resume: folder of one to go on from.
    """
    items = all_groups()
    mine = items if ranks.size == 1 else items[:3] if ranks.is_first else items[3:]
    groups, advantages = [group for group, _ in mine], torch.stack([advantage for _, advantage in mine])
    policy = adapted(variant, ranks)
    optimizer = _optimizer(policy, CONFIG)
    whole = WholeCopy(policy, ranks, "float32")
    done = load_checkpoint(resume, policy, optimizer) if resume else 0
    totals = Totals(sum(len(r.tokens) for g, _ in items for r in g.rollouts), 4 * len(items), {})
    for step in range(done, STEPS):
        whole.refresh()
        micro = _micro_batches(policy, groups, advantages, CONFIG, ranks)
        _score(policy, partial(policy, adapters=False), micro, CONFIG)
        statistics = _update(policy, optimizer, micro, totals, CONFIG, ranks, step, Clock())
        if folder and step == 1:
            save_checkpoint(folder, step + 1, policy, optimizer, ranks, keep=1)
    found = {name: p.full_tensor().detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    found |= {f"decodes {name}": p.clone() for name, p in whole.refresh().named_parameters()}
    return found | {name: torch.tensor(value) for name, value in statistics.items()}


if __name__ == "__main__":
    with join_ranks() as ranks:
        for variant in VARIANTS:
            found = run(variant, ranks, Path(sys.argv[1]) / variant)
            if ranks.is_first:
                torch.save(found, Path(sys.argv[1]) / f"{variant}.pt")
