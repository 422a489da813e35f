"""An update of the same four groups on 1 and on 2 ranks under FSDP2, a process each with one thread, on a CPU.

torchrun starts the processes. The first rank alone and all of them together have a sharded policy of their own and take
turns; whoever has no part in a turn waits. An update is a group a micro-batch, the gradient clipped, AdamW. Theory:

    seconds on n ranks = seconds on one / n + bytes that a rank receives / rate

A micro-batch gathers all weights for its forward pass and those of layers and blocks again for its backward pass, the
last one scatters the gradients, all in float32; of each a rank receives (n - 1) / n. The rate is measured, of gathering
a decoder layer. Nothing is hidden behind the computation, and nobody waits for memory that cores share.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from bench import timing
from bench.packed import speedup
from bench.packed_sides import OPTIONS, case_of, make_model
from bench.random_model import ARCHITECTURES, SIZES, make_groups
from medground.packing import pack
from medground.sharding import Ranks, join_ranks, shard

ROOT = Path(__file__).parents[1]
RANKS, GROUPS = (1, 2), 4
CPU = torch.device("cpu")
CLOSE = 1e-3
"""Most that the norms of the gradients may differ between numbers of ranks, relative."""


def measure_ranks(name: str, rounds: int) -> dict[str, Any]:
    """Seconds on each number of ranks beside theory's, as JSON has it.

    Raises:
        ValueError: there are fewer cores than ranks.
        RuntimeError: a rank failed; says how.
    """
    cores = len(os.sched_getaffinity(0))
    if cores < max(RANKS):
        raise ValueError(f"want a core for each of {max(RANKS)} ranks; got {cores}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(max(RANKS))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        work = [*launch, "-m", "bench.curves_ranks", name, str(rounds), str(out)]
        done = subprocess.run(work, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"bench.curves_ranks failed:\n{done.stderr}")
        return summarize(**json.loads(out.read_text()))


def summarize(seconds: Sequence[Sequence[float]], received: Sequence[float], rate: float) -> dict[str, Any]:
    """Speed-up, efficiency and what theory says.

    Args:
        seconds: of each number of ranks by round.
        received: bytes that a rank of each receives in an update.
        rate: bytes a second.
    """
    alone = seconds[0]
    points = []
    for ranks, samples, coming in zip(RANKS, seconds, received, strict=True):
        gain = speedup(list(alone), list(samples))
        predicted = median(alone) / ranks + coming / rate
        points.append(
            {
                "ranks": ranks,
                "samples": list(samples),
                "seconds": median(samples),
                "predicted": predicted,
                "speedup": gain,
                "efficiency": gain["median"] / ranks,
                "received": coming,
            }
        )
    return {"groups": GROUPS, "rate": rate, "points": points}


class _Side:
    """The first `size` ranks with a policy of their own, and this one's share of the groups."""

    def __init__(self, name: str, size: int, rank: int):
        mesh = DeviceMesh("cpu", list(range(size)))  # which every rank must call
        self.size, self.takes_part = size, rank < size
        if not self.takes_part:
            return
        shape = ARCHITECTURES[name]
        case = case_of(name, shape, SIZES[name], make_model(shape, CPU), prompts=GROUPS)
        self.mine = make_groups(case.prompts, shape.V, case.size)[rank::size]
        self.config, self.advantages, self.tokens = case.vlm.config, case.advantages, GROUPS * len(case.old_logp)
        visual, text = case.vlm.model.visual, case.vlm.model.language_model
        self.layer = sum(weight.numel() for weight in text.layers[0].parameters())
        again = sum(weight.numel() for part in (visual.blocks, text.layers) for weight in part.parameters())
        every = sum(weight.numel() for weight in case.policy.parameters())
        self.received = 4 * (len(self.mine) * (every + again) + every) * (size - 1) / size
        self.policy = shard(case.policy, Ranks(rank, size, CPU, mesh), "float32")
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        self.group = mesh.get_group()

    def update(self) -> float:
        """One optimizer step: the norm of its gradient."""
        for i, group in enumerate(self.mine):
            cast(FSDPModule, self.policy).set_requires_gradient_sync(i + 1 == len(self.mine))
            loss = self.policy.loss(
                pack([group], self.config, CPU), self.advantages, old_logp=None, ref_logp=None, options=OPTIONS,
                total_tokens=self.tokens
            ).loss  # fmt: skip
            (loss * self.size).backward()  # FSDP2 averages over the ranks; we want the sum
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0).full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def gathering(self) -> float:
        """Bytes a second that this rank receives when a decoder layer is gathered."""
        part = torch.ones(-(-self.layer // self.size))
        whole = torch.empty(len(part) * self.size)
        turn = timing.Turn(lambda: dist.all_gather_into_tensor(whole, part, group=self.group))
        timing.timed(turn)
        return (whole.nbytes - part.nbytes) / median(timing.timed(turn) for _ in range(20))


def _race(sides: Sequence[_Side], ranks: Ranks, rounds: int) -> list[list[float]]:
    """Seconds of the slowest rank of each side, by round; the first round is thrown away."""
    samples: list[list[float]] = [[] for _ in sides]
    with timing.no_collection():
        for turn in range(rounds + 1):
            norms = []
            for at in range(len(sides))[:: 1 if turn % 2 else -1]:
                ranks.barrier()
                seconds = 0.0
                if sides[at].takes_part:
                    start = timing.synced_clock()
                    norms.append(sides[at].update())
                    seconds = timing.synced_clock() - start
                samples[at] += [max(ranks.gather(seconds))] * (turn > 0)
            if not max(norms) <= min(norms) * (1 + CLOSE):
                raise ValueError(f"want the same gradient on {RANKS} ranks; got norms {norms}")
    return samples


def main() -> None:
    """A rank of torchrun's: `bench.curves_ranks MODEL ROUNDS FILE`."""
    name, rounds, out = sys.argv[1:]
    with join_ranks() as ranks:
        sides = [_Side(name, size, ranks.rank) for size in RANKS]
        seconds = _race(sides, ranks, int(rounds))
        rate = sides[-1].gathering()
        if ranks.is_first:
            found = {"seconds": seconds, "received": [side.received for side in sides], "rate": rate}
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
