"""DeepSpeed's side of `bench.zero`: ZeRO-2 or ZeRO-3 on padded rows, as MedGround-R1 and VLM-R1 train.

Settings are those of the `zero2.json` and `zero3.json` in the family of VLM-R1's scripts (as trainers that grew from it
ship them), `auto` filled in as transformers does, but for ZeRO-2's buckets: they are no larger than the model, for one
holds all its gradients either way. AdamW is torch's, fused, handed to `deepspeed.initialize` as transformers' trainer
does.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.race import UnavailableError
from bench.random_model import ARCHITECTURES
from bench.zero_sides import RowsLoss, Update, Work, over_ranks
from medground.build import build_optimizer
from medground.sharding import Ranks, compute_dtype

BUCKET = 200_000_000


def need_deepspeed() -> None:
    """See that DeepSpeed can be imported and, on a CPU, has the op that it builds before its first collective.

    Raises:
        UnavailableError: it cannot, or has not; says why.
    """
    try:
        import deepspeed
    except ImportError as error:
        missing = error.name or "deepspeed"
        raise UnavailableError(f"{missing} is not installed: `make peers`, then PYTHONPATH=peers") from error
    # where pip's --target puts ninja
    os.environ["PATH"] += os.pathsep + str(Path(deepspeed.__file__).parents[1] / "bin")
    try:
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()
    except RuntimeError as error:
        told = str(error).split(":")[0].strip(" .")
        raise UnavailableError(f"DeepSpeed wants a C++ compiler and ninja: {told}") from error


def settings(work: Work, ranks: Ranks, stage: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    H, G, bucket = ARCHITECTURES[work.model].hidden, work.size.G, min(BUCKET, parameters)
    stages = {
        2: {
            "overlap_comm": False,
            "allgather_partitions": True,
            "allgather_bucket_size": bucket,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
        },
        3: {
            "overlap_comm": True,
            "sub_group_size": 1_000_000_000,
            "reduce_bucket_size": H * H,
            "stage3_prefetch_bucket_size": H * H * 9 // 10,
            "stage3_param_persistence_threshold": 10 * H,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        },
    }
    prompts = work.config.rollout.prompts_per_step // ranks.size
    return {
        "train_micro_batch_size_per_gpu": prompts * G // len(work.rows),
        "gradient_accumulation_steps": len(work.rows),
        "gradient_clipping": work.config.optimizer.max_grad_norm,
        "bf16": {"enabled": compute_dtype(ranks, "auto") == torch.bfloat16},
        "zero_optimization": {"stage": stage, "contiguous_gradients": True} | stages[stage],
        "steps_per_print": 1_000_000_000,
    }


class DeepSpeed:
    """An engine of one stage."""

    def __init__(self, work: Work, ranks: Ranks, stage: int):
        import deepspeed

        self.work, self.ranks = work, ranks
        model = RowsLoss(work, ranks)
        parameters = sum(weight.numel() for weight in model.parameters())
        plain = functional.linear
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, work.config),
            config=settings(work, ranks, stage, parameters),
        )
        # ZeRO-3 puts its own in torch's place, for good and for everybody
        self.linear, functional.linear = functional.linear, plain

    def update(self) -> Update:
        plain, functional.linear = functional.linear, self.linear
        try:
            losses, batches = [], self.work.rows
            for batch in batches:
                loss = self.engine(batch)
                # the engine averages over ranks and micro-batches; we want the sum
                self.engine.backward(loss * self.ranks.size * len(batches))
                self.engine.step()
                losses.append(loss.detach())
        finally:
            functional.linear = plain
        return Update(over_ranks(losses, self.ranks), float(self.engine.get_global_grad_norm()))
