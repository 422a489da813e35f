"""The presets of `medground train`: the demo, and a model size, a data set and the GPUs at hand.

    qwen2.5-vl-{3b,7b}-{ms-cxr,chestxray8,m3d-refseg}         all weights
    qwen2.5-vl-{3b,7b}-{...}-lora-{24gb,48gb,80gb}            adapters, on one GPU

Of MedGround-R1 (arXiv:2507.02994), as far as it is known: 8 completions a prompt, temperature 1, beta 0.04, learning
rate 1e-6, 2 epochs. Its wording is the template `plain`; the run with the best log in its repository also says whose
left and right are meant, as `patient-side` does. Not known, and ours: prompts a step, warm-up, everything of adapters.
None of it is tuned.

What fits, by counting, in 10^9 bytes (7B: 8.29e9 weights, 6.53e9 of them in products that have adapters; 3B: 3.75e9 and
2.77e9; bfloat16 but for the adapters):

    adapters, one GPU                     3b-24gb  3b-48gb  3b-80gb  7b-48gb  7b-80gb
    model, frozen                             7.5      7.5      7.5     16.6     16.6
    products with adapters merged, decode     5.5      5.5      5.5     13.1     13.1
    adapters, gradients, moments              1.0      1.9      1.9      1.3      2.6
    embedding, head and two layers, whole     0.9      0.9      0.9      3.1      3.1
    keys and values                           2.0      8.0      8.0      3.0      8.0
    activations of a micro-batch              2.6      5.2     42        4.1      8.3
    logits                                    1.3      1.3      1.3      1.3      1.3
    sum                                      20.8     30.3     67       42.5     53

The model once and its products merged are 29.7 for 7B: no GPU of 24 GB holds them, so there is no such preset.

    all weights, a rank of eight              3b       7b
    weights, gradients, moments, float32      7.5     16.6
    reference policy, bfloat16                0.9      2.1
    what decodes, whole                       7.5     16.6
    as above: whole units                     1.9      6.2   with their gradients
    keys and values                           8.0      8.0
    activations of a micro-batch             42        8.3
    logits                                    1.3      1.3
    sum                                      69       59

Gradients kept whole until the last micro-batch would add 4 bytes a weight, 33 for 7B: `reduce` is `each`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from medground.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    ShardingConfig,
)

DATA_SETS = ("ms-cxr", "chestxray8", "m3d-refseg")

_DEMO = Config(
    out="runs/demo/grpo",
    steps=200,
    model=ModelConfig(path="runs/demo/base"),
    data=DataConfig(path=("runs/demo/data",)),
    prompt=PromptConfig(template="brief"),
    rollout=RolloutConfig(prompts_per_step=32, group_size=8, max_new_tokens=64),
    reward=RewardConfig(format_weight=0.2, spatial_weight=1.0),
    loss=LossConfig(loss_type="dr_grpo", beta=0.0, micro_batch_tokens=4096),
    optimizer=OptimizerConfig(lr=7e-4, final_lr_fraction=0.3, beta2=0.98),
    evaluation=EvaluationConfig(every=25, curve_records=128),
)
_DEMO_TEXT = "Phantom films and the small base model; two CPU cores, about four minutes."


@dataclass(frozen=True)
class _Gpu:
    """What adapters of a model size take of a GPU."""

    size: str  # of the model
    memory_gb: int
    rank: int
    cache_gb: float
    max_rows: int
    micro_batch_tokens: int
    activations: Literal["selective", "full"]


_GPUS = (
    _Gpu("3b", 24, rank=32, cache_gb=2.0, max_rows=64, micro_batch_tokens=8192, activations="full"),
    _Gpu("3b", 48, rank=64, cache_gb=8.0, max_rows=256, micro_batch_tokens=16384, activations="full"),
    _Gpu("3b", 80, rank=64, cache_gb=8.0, max_rows=256, micro_batch_tokens=16384, activations="selective"),
    _Gpu("7b", 48, rank=32, cache_gb=3.0, max_rows=64, micro_batch_tokens=8192, activations="full"),
    _Gpu("7b", 80, rank=64, cache_gb=8.0, max_rows=256, micro_batch_tokens=16384, activations="full"),
)


def _all_weights(size: str, data: str) -> Config:
    small = size == "3b"
    return Config(
        out=f"runs/qwen2.5-vl-{size}-{data}",
        epochs=2,
        model=ModelConfig(
            path=f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct", activation_checkpointing="selective" if small else "full"
        ),
        data=DataConfig(path=(f"data/{data}",), max_pixels=644 * 644),
        sharding=ShardingConfig(reduce="each"),
        prompt=PromptConfig(template="patient-side"),
        rollout=RolloutConfig(prompts_per_step=16, group_size=8, temperature=1.0),
        loss=LossConfig(beta=0.04),
        optimizer=OptimizerConfig(lr=1e-6),
    )


def _adapters(gpu: _Gpu, data: str) -> Config:
    full = _all_weights(gpu.size, data)
    return dataclasses.replace(
        full,
        out=f"{full.out}-lora-{gpu.memory_gb}gb",
        model=dataclasses.replace(
            full.model, activation_checkpointing=gpu.activations, lora=LoraConfig(rank=gpu.rank, alpha=gpu.rank // 2)
        ),
        rollout=dataclasses.replace(full.rollout, cache_gb=gpu.cache_gb, max_rows=gpu.max_rows),
        loss=dataclasses.replace(full.loss, micro_batch_tokens=gpu.micro_batch_tokens),
        optimizer=OptimizerConfig(lr=1e-5),  # ten times that of all weights, a rule of thumb
    )


_NODE = "all weights; a node of eight 80 GB GPUs, or several"
_KINDS: list[tuple[str, str, Callable[[str], Config]]] = [
    *((f"qwen2.5-vl-{size}-DATA", _NODE, partial(_all_weights, size)) for size in ("3b", "7b")),
    *((f"qwen2.5-vl-{gpu.size}-DATA-lora-{gpu.memory_gb}gb", f"adapters (LoRA); one {gpu.memory_gb} GB GPU",
       partial(_adapters, gpu)) for gpu in _GPUS),
]  # fmt: skip
"""Name, what it is for, and the configuration for a data set."""

PRESETS = {"demo": (_DEMO_TEXT, _DEMO)} | {
    name.replace("DATA", data): (f"{data}, {text}.", make(data)) for data in DATA_SETS for name, text, make in _KINDS
}
"""By name: what it is for, and its configuration."""


def listing() -> str:
    """The presets as `medground train` lists them, data sets not written out."""
    rows = [("demo", _DEMO_TEXT), *((name, text) for name, text, _ in _KINDS)]
    table = "\n".join(f"  {name:28} {text[:1].lower()}{text[1:].removesuffix('.')}" for name, text in rows)
    return f"{table}\nDATA is {', '.join(DATA_SETS)}: records in data/DATA, or in --data.path"
