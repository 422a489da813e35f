"""The same steps of a small model on 1, 2 and 4 ranks, all settings that must not change them, started as one program.

python tests/rank_runs.py FOLDER BASE DATA: the first rank writes what each run came to, FOLDER/RUN-RANKS.pt, and the
evaluation of the model in BASE on DATA to FOLDER/eval-RANKS. Ranks are forked from one process, which has imported
everything, and are on the CPU.
"""

import os
import signal
import sys
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft  # noqa: F401  # before the ranks are forked
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from eight_bit import has_torchao
from stream_cases import small_model
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from uneven_update import LARGEST, all_groups, update

from bench.loading import peak_growth, write_model
from medground.adamw import adamw, state_of
from medground.build import build_optimizer, build_policy, build_reference
from medground.checkpoint import Checkpoints
from medground.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    ShardingConfig,
)
from medground.eval_config import EvalConfig
from medground.eval_folder import Part, Piece, Row
from medground.evaluate_model import evaluate_on
from medground.export import export_policy
from medground.sharding import Ranks, WholeCopy, join_ranks
from medground.step_metrics import Clock, Totals
from medground.train import _micro_batches, _score, _update

STEPS, SAVED = 5, 3


class Run(NamedTuple):
    """What changes nothing: ranks, replicas, what is computed again, and when gradients are summed; and what is run."""

    lora: bool
    tied: bool
    ranks: int
    replicas: int = 1
    activations: str = "none"
    reduce: str = "last"
    cpu_offload: bool = False

    @property
    def model(self) -> str:
        return f"{'lora' if self.lora else 'full'}-{'tied' if self.tied else 'untied'}"

    @property
    def name(self) -> str:
        words = [self.model, str(self.ranks), f"{self.replicas}x", self.activations, self.reduce]
        return "-".join(words + ["offloaded"] * self.cpu_offload)


ALONE = [Run(lora, tied, 1) for lora in (False, True) for tied in (False, True)]
SHARDED = [
    Run(False, False, 2, 1, "full"),
    Run(False, True, 2, 1, "selective", "each"),
    Run(True, False, 2, 2, "none", cpu_offload=True),
    Run(False, True, 4, 2, "none", "each"),
    Run(True, True, 4, 2, "full"),
    Run(False, False, 4, 1, "selective"),
]
SAVING = [SHARDED[2], SHARDED[3]]
"""Those that leave a checkpoint, to go on from on one rank, and an export."""
GRADIENT = LossConfig(beta=0.1, loss_type="dapo")
SHARES = {1: [(1, 5)], 2: [(1, 3), (3, 5)], 4: [(1, 2), (2, 3), (3, 4), (4, 5)]}
"""Groups of each rank, by number of ranks: two large ones, two small ones, half of them with an image."""


def config_of(run: Run, folder: Path) -> Config:
    return Config(
        out="unused",
        steps=STEPS,
        model=ModelConfig(
            path=str(model_folder(folder, run.tied)),
            activation_checkpointing=run.activations,  # type: ignore[arg-type]
            lora=LoraConfig(rank=3 * run.lora, alpha=6),
        ),
        data=DataConfig(path=("unused",)),
        sharding=ShardingConfig(replicas=run.replicas, reduce=run.reduce, cpu_offload=run.cpu_offload),  # type: ignore[arg-type]
        rollout=RolloutConfig(group_size=4, max_new_tokens=40, old_logp="rescored"),
        loss=LossConfig(loss_type="dapo", beta=0.0 if run.tied else 0.1, micro_batch_tokens=LARGEST),
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=0, final_lr_fraction=1.0),
    )


def model_folder(folder: Path, tied: bool) -> Path:
    return folder / ("tied" if tied else "untied")


def save_models(folder: Path) -> None:
    """Tied and untied; rows of odd numbers, so that shards are uneven."""
    for tied in (False, True):
        vlm = small_model(vision={"depth": 1, "fullatt_block_indexes": [0]}, intermediate_size=75, num_hidden_layers=2)
        vlm.config.tie_word_embeddings = vlm.config.text_config.tie_word_embeddings = tied
        vlm.tie_weights()
        vlm.save_pretrained(model_folder(folder, tied))


def steps_of(run: Run, ranks: Ranks, folder: Path, resume: Path | None = None) -> dict[str, Tensor]:
    """All steps: losses and norms, weights that are trained and those that decode, by name.

    Args:
        run: what is run, on as many ranks as it says.
        ranks: each has its part of the groups.
        folder: of the models and of results.
        resume: folder of a checkpoint to go on from.
    """
    config, everything = config_of(run, folder), all_groups()
    items, mine = (everything[slice(*share)] for share in (SHARES[1][0], SHARES[ranks.size][ranks.rank]))
    groups, advantages = [group for group, _ in mine], torch.stack([advantage for _, advantage in mine])
    model, ranks = Path(config.model.path), ranks.arranged(run.replicas)
    policy = build_policy(model, config, ranks)
    reference = build_reference(policy, model, config, ranks)
    optimizer = build_optimizer(policy, config)
    whole = WholeCopy(policy, ranks, config.model.precision)
    whole.refresh()
    checkpoints = Checkpoints(resume or folder / f"{run.name}-checkpoints", ranks, keep=1)
    done, _ = checkpoints.load(policy, optimizer) if resume else (0, {})
    totals = Totals(sum(len(r.tokens) for g, _ in items for r in g.rollouts), 4 * len(items), {})
    statistics = []
    for step in range(done, STEPS):
        micro = _micro_batches(policy, groups, advantages, config, ranks)
        _score(policy, reference, micro, config)
        statistics.append(_update(policy, optimizer, micro, totals, config, ranks, step, Clock()))
        if step + 1 == SAVED and run in SAVING:
            checkpoints.save(SAVED, policy, optimizer, {})
    checkpoints.wait()
    checkpoints.close()
    if run in SAVING:
        export_policy(folder / f"{run.name}-export", policy, model, ranks)
    found = {name: p.full_tensor().detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    found |= {f"decodes {name}": p.clone() for name, p in whole.refresh().named_parameters()}
    return found | {name: torch.tensor([row[name] for row in statistics]) for name in statistics[0]}


def gradient_of(ranks: Ranks) -> dict[str, Any]:
    """Of one huge step of plain gradient descent; and how many groups moved to another rank."""
    mine = all_groups()[6 * ranks.rank // ranks.size : 6 * (ranks.rank + 1) // ranks.size]  # most work is rank 0's
    weights, statistics, moved = update(mine, ranks, LARGEST if ranks.size > 1 else 10_000, GRADIENT)
    return {"weights": weights, "statistics": statistics, "moved": sum(ranks.gather(moved))}


def loading_of(ranks: Ranks, folder: Path) -> dict[str, int]:
    """By how much a rank's memory grows at most where it loads a model large enough to tell."""
    config = config_of(ALONE[0], folder)
    growth, _ = peak_growth(lambda: build_policy(folder / "large", config, ranks))
    return {"bytes": max(ranks.gather(growth))}


def eight_bit_of(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """Weights and moments after three steps in 8 bits on made-up gradients; the last one again, from two ranks' state.

    Rows are more than ranks have evenly, and in one case fewer than ranks.
    """
    shapes, config = [(9, 512), (97, 64), (1, 8192)], OptimizerConfig(kind="adamw-8bit", lr=0.01)
    found: dict[str, Tensor] = {}
    for first in (0, 2) if ranks.size == 1 else (0,):
        generator = torch.Generator().manual_seed(1)

        def drawn(shape: tuple[int, int], generator: torch.Generator = generator) -> Tensor:
            return distribute_tensor(torch.randn(shape, generator=generator), ranks.mesh, [Shard(0)])

        weights = [torch.nn.Parameter(drawn(shape)) for shape in shapes]
        optimizer = adamw(weights, config)
        state = {f"{i}.weight": weight.data for i, weight in enumerate(weights)}
        state |= {f"{i}.{name}": t for i, w in enumerate(weights) for name, t in state_of(optimizer, w).items()}
        if first:
            dcp.load(state, checkpoint_id=folder / "eight-bit")
        for step in range(3):
            for weight, shape in zip(weights, shapes, strict=True):
                weight.grad = drawn(shape)
            if step >= first:
                optimizer.step()
            if step == 1 and ranks.size == 2:
                dcp.save(state, checkpoint_id=folder / "eight-bit")
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
        found |= {f"{name} from {first}": t.clone() for name, t in whole.items()}
    return found


def evaluation_of(ranks: Ranks, folder: Path, base: str, data: str) -> dict[str, Any]:
    """Leaves its results in a folder; on two ranks, one that was killed in the midst of it."""
    evaluate_on(
        ranks,
        EvalConfig(
            model=base, data=(data,), template="brief", max_new_tokens=24, samples=2, temperature=0.8, piece=3,
            controls=("flipped",), out=str(folder / f"eval-{ranks.size}"),
        ),
    )  # fmt: skip
    return {}


def _killed(rank: int, size: int, folder: Path, base: str, data: str) -> None:
    """An evaluation of which the second rank is killed within a line."""
    add = Part.add

    def killed_in_the_third(part: Part, piece: Piece, rows: list[Row]) -> None:
        add(part, piece, rows)
        if rank == 1 and piece.number >= 5:
            os.truncate(part._file.name, os.path.getsize(part._file.name) - 20)
            os.kill(os.getpid(), signal.SIGKILL)

    Part.add = killed_in_the_third  # type: ignore[method-assign]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    with join_ranks() as ranks:
        evaluation_of(ranks, folder, base, data)


def _rank(rank: int, size: int, folder: Path, base: str, data: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    runs = {run.name: partial(steps_of, run, folder=folder) for run in ALONE + SHARDED if run.ranks == size}
    if size == 1:
        for run in SAVING:
            alone, resume = run._replace(ranks=1, replicas=1), folder / f"{run.name}-checkpoints"
            runs[f"{run.name}-resumed"] = partial(steps_of, alone, folder=folder, resume=resume)
    with join_ranks() as ranks:
        if size < 4:
            runs |= {f"gradient-{size}": gradient_of, f"loading-{size}": partial(loading_of, folder=folder)}
            runs["evaluation"] = partial(evaluation_of, folder=folder, base=base, data=data)
        if has_torchao():
            runs[f"eight-bit-{size}"] = partial(eight_bit_of, folder=folder)
        for name, run in runs.items():
            found = run(ranks)
            if ranks.is_first:
                torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    folder, base, data = Path(sys.argv[1]), *sys.argv[2:]
    torch.compiler.set_stance("force_eager")  # torchao compiles its step once a shape, half a minute each on a CPU
    save_models(folder)
    write_model("small", folder / "large")
    for size, run in ((2, _killed), (4, _rank), (2, _rank), (1, _rank)):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ |= {  # as torchrun sets them
            "TORCHELASTIC_RUN_ID": "one",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
        }
        with suppress(torch.multiprocessing.ProcessExitedException) if run is _killed else nullcontext():
            torch.multiprocessing.start_processes(run, (size, folder, base, data), nprocs=size, start_method="fork")
