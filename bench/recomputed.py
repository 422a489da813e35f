"""What the backward pass computes again instead of keeping it: most memory and seconds of an update, of each kind.

    python -m bench.recomputed                              a small model on a CPU
    python -m bench.recomputed --compile                    its layers compiled
    python -m bench.recomputed --lora 16                    adapters of that rank
    python -m bench.recomputed --device cuda --model 3b     shapes of 3B on a GPU

One packed group, forward and backward pass of the GRPO loss. Memory is what an update holds at most beyond the weights,
its gradients included. On a CPU, with one thread, seconds are the processor's, so that others on the machine matter
less.
"""

import argparse
import time
from functools import partial
from statistics import median

import torch

from bench import timing
from bench.packed_sides import Case, make_case, our_loss
from medground.activation_checkpointing import checkpoint_activations
from medground.config import LoraConfig

KINDS = ("none", "selective", "full")


def make_one(model: str, device: torch.device, rank: int, kind: str, compiled: bool) -> Case:
    torch.compiler.reset()  # or layers compiled for another kind would do
    case = make_case(model, device, prompts=1)
    if rank:
        case.policy.add_adapters(LoraConfig(rank=rank), seed=0)
    checkpoint_activations(case.policy.train().vlm, kind, compiled=compiled)
    if compiled:
        case.policy.compile_layers()
    return case


def update(case: Case) -> None:
    our_loss(case, [case.group]).backward()


def seconds_of(turn: timing.Turn) -> float:
    if torch.cuda.is_available():
        return timing.timed(turn)
    turn.prepare()
    start = time.process_time()
    turn.call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.recomputed", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="small")
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| kind | seconds | spread | most memory, MB | gradient off by |\n|---|--:|--:|--:|--:|")
    want = None
    for kind in KINDS:
        case = make_one(args.model, torch.device(args.device), args.lora, kind, args.compile)
        update(case)
        found = torch.cat([weight.grad.flatten() for weight in case.policy.parameters() if weight.grad is not None])
        want = found if want is None else want
        turn = timing.Turn(partial(update, case), case.policy.zero_grad)
        runs = sorted(seconds_of(turn) for _ in range(args.rounds))
        memory, off = timing.peak_memory(turn), float((found - want).norm() / want.norm())
        spread = f"{runs[0]:.3g}-{runs[-1]:.3g}"
        print(f"| {kind} | {median(runs):.3g} | {spread} | {memory / 1e6:.0f} | {off:.0e} |", flush=True)


if __name__ == "__main__":
    main()
