"""Most memory that a process takes to load a model, on 1, 2 and 4 ranks; and the seconds; on a CPU.

    python -m bench.loading                 a model of 1e9 weights, written in bfloat16
    python -m bench.loading --model small   a small one

"trained" has float32 weights, "frozen" those of the reference policy, in bfloat16. Beside it is transformers'
`from_pretrained`, which every rank of a plain script calls: whole, whatever the number of ranks. What is counted is how
far the peak of the process's resident memory (VmHWM) lies above what it had before, pages of the file that it has open
included. Processes are forked from one that has imported everything.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.random_model import ARCHITECTURES, SIZES, make_config, make_processor, make_vlm
from medground.build import build_policy, build_reference
from medground.config import Config, DataConfig, LossConfig, ModelConfig
from medground.sharding import join_ranks

RANKS = (1, 2, 4)
MODELS = {
    "small": replace(ARCHITECTURES["small"], hidden=512, V=20_000),
    "cut 3b": replace(ARCHITECTURES["3b"], layers=6, vision_depth=8, full_attention=(7,)),
}
"""The second has layers and vocabulary of 3B, but few of the layers."""


class Peak(NamedTuple):
    """Of the rank that took most: bytes, and seconds."""

    bytes: int
    seconds: float


def write_model(name: str, folder: Path) -> int:
    """A model in bfloat16 in a folder; bytes of its weights."""
    # not in this process, which is forked: torch's threads would not be there in its children
    torch.multiprocessing.start_processes(_write, (name, folder), start_method="fork")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write(_: int, name: str, folder: Path) -> None:
    config = make_config(MODELS[name], make_processor(MODELS[name].V, SIZES["small"]))
    make_vlm(config, torch.device("cpu"), torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")


def measure(folder: Path, ranks: int, what: str) -> Peak:
    """Of loading a folder: 'trained', 'frozen' or 'from_pretrained'."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {  # as torchrun sets them
        "TORCHELASTIC_RUN_ID": "one",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    with tempfile.TemporaryDirectory() as out:
        work = (ranks, folder, what, Path(out))
        torch.multiprocessing.start_processes(_rank, work, nprocs=ranks, start_method="fork")
        found = [torch.load(file, weights_only=True) for file in Path(out).iterdir()]
    return Peak(*(max(column) for column in zip(*found, strict=True)))


def _rank(rank: int, ranks: int, folder: Path, what: str, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    config = Config(
        out="unused",
        steps=1,
        model=ModelConfig(path=str(folder), precision="bfloat16"),
        data=DataConfig(path=("unused",)),
        loss=LossConfig(beta=1.0),
    )
    with join_ranks() as joined:
        loads: dict[str, Callable[[], Any]] = {
            "trained": partial(build_policy, folder, config, joined),
            "frozen": partial(build_reference, None, folder, config, joined),
            "from_pretrained": partial(
                Qwen2_5_VLForConditionalGeneration.from_pretrained, folder, dtype=torch.float32
            ),
        }  # fmt: skip
        torch.save(peak_growth(loads[what]), out / str(rank))


def peak_growth(call: Callable[[], Any]) -> tuple[int, float]:
    """Bytes by which the peak of resident memory grows in a call, and its seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before, start = _status("VmHWM"), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return _status("VmHWM") - before, seconds


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="cut 3b")
    name = parser.parse_args().model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_model(name, folder)
        print(f"{name}: {size / 1e9:.2f} GB of bfloat16 in {len(list(folder.glob('*.safetensors')))} files\n")
        print("| weights | ranks | most memory of a rank, GB | seconds |\n|---|--:|--:|--:|")
        for what in ("from_pretrained", "trained", "frozen"):
            for ranks in RANKS:
                if what == "from_pretrained" and ranks > 1:
                    continue
                peak = measure(folder, ranks, what)
                print(f"| {what} | {ranks} | {peak.bytes / 1e9:.2f} | {peak.seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
