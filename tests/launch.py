"""Several ranks on this machine."""

import os
import subprocess
import sys

import torch


def torchrun(ranks: int, *words: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `torchrun WORDS` to its end, a thread a rank; on the CPU where there is no GPU for each, as NCCL wants."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launch, *words], env=environment(ranks), capture_output=True, text=True, timeout=timeout, check=False
    )


def environment(ranks: int, **more: str) -> dict[str, str]:
    """The environment that `ranks` ranks are started in."""
    found = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return found | {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < ranks else found
