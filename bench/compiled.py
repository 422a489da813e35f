"""Every Triton kernel as it is compiled for an H100 (sm_90), on a machine that needs no GPU, as one Markdown table.

    python -m bench.compiled --json compiled.json

The public ops run, forward and backward, on tensors without memory that pass for CUDA ones, at the sizes of a real
run. Each launch then goes through Triton's own `JITFunction.run`, which specialises and compiles as it would on the
GPU and stops short of launching: what is measured here is what a launch runs, whatever a kernel's signature becomes.
An op that waits for the device fails, since there is nothing to wait for.

registers      a thread, of 255
spills         bytes of stack a thread: registers that did not fit
shared_memory  bytes a program
load_bytes     widest load from global memory in the loop over V (over keys, in attention), of two such loops in the
               worse one; in the whole kernel if it has no loop. 16 is best
"""

from __future__ import annotations

import argparse
import importlib
import json
import linecache
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
COLUMNS = ("kernel", "shape", "registers", "spills", "shared_memory", "load_bytes")
SIZES = {"3B": (2048, 151_936), "7B": (3584, 152_064)}  # H, V of Qwen2.5-VL
HEADS = {"3B": (16, 2, 128), "7B": (28, 4, 128)}  # Hq, Hkv, D of its attention
N, S = 8192, 64  # scored tokens and sequences of a micro-batch
R = 64  # rows that a decoding step samples
A, C, PREFIX = 8, 512, 640  # the groups that they belong to, room for a row's own tokens and for a group's prefix
B, G, P, M, K = 64, 8, 8, 4, 3  # prompts, completions of each, predicted and true boxes, rewards


class Call(NamedTuple):
    """`op` (module and function), its arguments by name, and where it takes them those of its GrpoOptions."""

    op: str
    shape: str
    args: dict[str, Any]
    options: dict[str, Any] | None = None


class Launch(NamedTuple):
    """A kernel launched by a call, compiled."""

    kernel: str
    shape: str
    compiled: Any


def calls() -> Iterator[Call]:
    """Every public op that has kernels, at every size."""
    for name, (H, V) in SIZES.items():
        yield from _calls_over_vocabulary(name, H, V)
    for name, (Hq, Hkv, D) in HEADS.items():
        yield _decode_call(name, Hq, Hkv, D)
        yield _fold_call(name, Hkv, D)
    yield from _grpo_calls()
    yield from _reward_calls()


def _calls_over_vocabulary(name: str, H: int, V: int) -> Iterator[Call]:
    targets = torch.empty(N, dtype=torch.int64)
    logits = {"logits": _leaf(N, V), "targets": targets}
    yield Call("token_logprob.token_logprob", f"{name}, N {N}, V {V}", logits)
    linear = {"hidden": _leaf(N, H), "weight": _leaf(V, H), "targets": targets}
    shape = f"{name}, N {N}, H {H}, V {V}"
    yield Call("linear_logprob.linear_logprob", shape, linear | {"bias": None})
    yield Call("linear_logprob.linear_logprob", f"{shape}, bias", linear | {"bias": _leaf(V)})
    for variant, args, options in _grpo_variants():
        yield Call("linear_grpo.linear_grpo", f"{shape}, {variant}", linear | args, options)
    rows = {"logits": _leaf(R, V).detach(), "seeds": torch.empty(R, dtype=torch.int64), "step": 3}
    banned = torch.empty(2, dtype=torch.int64)
    for variant, args in {
        "": {"temperature": 0.7, "banned": banned},
        ", top-k and top-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "banned": banned},
        ", greedy": {"temperature": 0.0},
    }.items():
        yield Call("sample_token.sample_token", f"{name}, R {R}, V {V}{variant}", rows | args)


def _decode_call(name: str, Hq: int, Hkv: int, D: int) -> Call:
    prefix, suffix = (A, Hkv, PREFIX, D), (R, Hkv, C, D)
    tensors = {"q": (R, Hq, D), "k": (R, Hkv, D), "v": (R, Hkv, D)}
    tensors |= {"prefix_k": prefix, "prefix_v": prefix, "suffix_k": suffix, "suffix_v": suffix}
    args = {key: _leaf(*shape).detach() for key, shape in tensors.items()}
    args |= {"prefix_lengths": torch.empty(A, dtype=torch.int32), "suffix_lengths": torch.empty(R, dtype=torch.int32)}
    args |= {"members": torch.empty(A, R // A, dtype=torch.int64), "places": torch.empty(R, dtype=torch.int64)}
    return Call("prefix_decode.prefix_decode", f"{name}, R {R}, A {A}, P {PREFIX}, C {C}, Hq {Hq}, D {D}", args)


def _fold_call(name: str, Hkv: int, D: int) -> Call:
    """Of prefix_attention the one part that is ours: the attention itself would ask for a GPU."""
    tokens, copies = A * (PREFIX + G * C), A * (PREFIX + G * (PREFIX + C))
    sizes = {"source": copies, "readers": copies, "starts": tokens + 1}
    rows = _module("varlen_attention").Rows(**{key: torch.empty(n, dtype=torch.int64) for key, n in sizes.items()})
    grad = _leaf(copies, Hkv, D).detach()
    return Call("prefix_attention._fold", f"{name}, T {tokens}, K {copies}, Hkv {Hkv}", {"grad": grad, "rows": rows})


def _grpo_variants() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    common = {"advantages": torch.empty(S), "cu_seqlens": torch.empty(S + 1, dtype=torch.int32)}
    old, ref = {"old_logp": torch.empty(N)}, {"ref_logp": torch.empty(N)}
    yield "dapo", common | old | ref, {"loss_type": "dapo", "beta": 0.04, "kl": "k3"}
    yield "on policy", common, {}
    yield (
        "cispo, k1 times ratio",
        common | old | ref,
        {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.1, "kl": "k1", "kl_ratio": True},
    )
    yield (
        "sapo of sequences, k2",
        common | old | ref,
        {"loss_type": "sapo", "ratio_level": "sequence", "beta": 0.1, "kl": "k2"},
    )
    yield "sequence ratio", common | old, {"ratio_level": "sequence", "entropy_coef": 0.01}


def _grpo_calls() -> Iterator[Call]:
    for variant, args, options in _grpo_variants():
        args |= {"logp": _leaf(N, dtype=torch.float32), "entropy": _leaf(N, dtype=torch.float32)}
        yield Call("grpo_loss.grpo_loss", f"N {N}, S {S}, {variant}", args, options)


def _reward_calls() -> Iterator[Call]:
    boxes = {"pred": torch.empty(B * G, P, 4), "truth": torch.empty(B * G, M, 4)}
    shape = f"{B * G} sets of {P} and {M}"
    for kind in ("iou", "giou", "diou", "ciou"):
        yield Call("box_iou.box_iou", f"{shape}, {kind}", boxes | {"kind": kind})
    counts = {name: torch.empty(B * G, dtype=torch.int64) for name in ("pred_count", "truth_count")}
    yield Call("box_iou.matched_iou", shape, boxes | counts)
    for normalize in ("group", "batch", "none"):
        args = {"rewards": torch.empty(B, G), "normalize": normalize}
        yield Call("group_advantage.group_advantage", f"{B} groups of {G}, {normalize}", args)
    weighted = {"rewards": torch.empty(B, G, K), "weights": torch.empty(K)}
    for per_reward in (False, True):
        shape = f"{B} groups of {G}, {K} rewards" + (" each on its own" if per_reward else "")
        yield Call("group_advantage.group_advantage", shape, weighted | {"per_reward": per_reward})


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def record() -> list[Launch]:
    """Make every call and return the kernels that it would have launched, each once a shape."""
    from torch._subclasses import FakeTensor, FakeTensorMode

    launches: dict[tuple[str, str, str], Launch] = {}
    with FakeTensorMode(), patch.object(FakeTensor, "is_cuda", True, create=True):
        for call in calls():
            with _compiling() as compiled:
                _make(call)
            for function, kernel in compiled:
                name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
                size = call.shape.partition(",")[0]
                launches.setdefault((name, size, kernel.hash), Launch(name, call.shape, kernel))
    return sorted(launches.values(), key=lambda launch: launch.kernel)


def _make(call: Call) -> None:
    """Run an op forward and backward."""
    module, op = call.op.split(".")
    args = dict(call.args)
    if call.options is not None:
        args["options"] = _module("grpo_options").GrpoOptions(**call.options)
    outputs = getattr(_module(module), op)(**args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    losses = [out.sum() for out in outputs if out.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()


def _module(name: str) -> ModuleType:
    # imported once TRITON_INTERPRET is out of the way
    return importlib.import_module(f"medground_kernels.{name}")


class _Sm90:
    """A driver for Triton that knows what to compile for, and cannot launch."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling() -> Iterator[list[tuple[Any, Any]]]:
    """Launches inside compile instead; the list fills with (kernel, what was compiled)."""
    from triton.runtime import JITFunction, driver

    run = JITFunction.run
    compiled: list[tuple[Any, Any]] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kwargs = {name: _pointer(value) for name, value in kwargs.items()}
        kernel = run(self, *map(_pointer, args), grid=grid, warmup=True, **kwargs)
        compiled.append((self, kernel))
        return kernel

    driver.set_active(_Sm90())
    with patch.object(JITFunction, "run", compile_only):
        yield compiled


def _pointer(value: Any) -> Any:
    """What Triton looks at in a tensor: its dtype, and how its address, counted from an allocation's, divides."""
    from triton.runtime.jit import MockTensor

    if not isinstance(value, Tensor):
        return value
    pointer = MockTensor(value.dtype, list(value.shape))
    address = value.storage_offset() * value.element_size()
    pointer.data_ptr = lambda: address
    return pointer


def table() -> list[dict[str, Any]]:
    """The rows, in the order of the kernels' names."""
    launches = record()
    kernels = {launch.compiled.hash: launch.compiled for launch in launches}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = dict(zip(kernels, pool.map(measure, kernels.values()), strict=True))
    return [{"kernel": kernel, "shape": shape} | measured[compiled.hash] for kernel, shape, compiled in launches]


def measure(compiled: Any) -> dict[str, int]:
    """What the table says about a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", "-g", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "registers": int(found[1]),
        # part of STACK, never of LOCAL; so is the frame of a called division, in which nothing is stored
        "spills": int(found[2]) if re.search(r"\b(STL|LDL)\b", sass) else 0,
        "shared_memory": compiled.metadata.shared,
        "load_bytes": load_bytes(sass),
    }


def load_bytes(sass: str) -> int:
    """Bytes of the widest load of a loop over V, the least of all such loops; of all loads where there is no loop."""
    lines = sass.splitlines()
    labels = {line.strip()[:-1]: at for at, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    loops = []
    for at, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        if branch and labels[branch[1]] < at:
            loops.append((labels[branch[1]], at))
    outer = [a for a in loops if not any(a != b and b[0] <= a[0] and a[1] <= b[1] for b in loops)]
    bodies = [lines[start:end] for start, end in outer]
    # other loops, such as one over banned tokens, count only where none is over V
    bodies = [body for body in bodies if _over_v(body)] or bodies
    return min(filter(None, map(_widest, bodies)), default=_widest(lines))


def _over_v(body: list[str]) -> bool:
    """Whether a loop works out the mask of a block of columns: a line of its source has `< V`."""
    sources = {found.groups() for line in body if (found := re.search(r'## File "(.+)", line (\d+)', line))}
    return any(re.search(r"< V\b", linecache.getline(file, int(number))) for file, number in sources)


def _widest(body: list[str]) -> int:
    """Bytes of the widest load from global memory; 0 where there is none."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    loads = re.findall(r"\bLDG(?:STS)?\.(\S+)", "\n".join(body))
    return max((next((widths[part] for part in load.split(".") if part in widths), 4) for load in loads), default=0)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def main() -> None:
    """Compile, measure, print and perhaps write down."""
    parser = argparse.ArgumentParser(description="Every kernel compiled for sm_90, as a Markdown table.")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not said
    import triton

    rows = table()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in COLUMNS) + " |")
    try:
        commit = _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    header = {"triton": triton.__version__, "torch": torch.__version__, "target": "sm_90", "commit": commit}
    print("\n" + ", ".join(f"{name} {value}" for name, value in header.items()))
    if args.json:
        args.json.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
