"""The configuration of a run: frozen dataclasses, validation, the file that a run keeps of its own.

Nothing here is derived: a value stands once. This module imports neither torch nor transformers,
so that `--help` answers at once. Presets are in presets.py.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medground_kernels.grpo_options import GrpoOptions


def _want(condition: bool, name: str, wanted: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: want {wanted}; got {got!r}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) in place of the model's own weights; wants peft.

    Never adapted are embedding, head, norms and vision tower: they stay as they are. Nor is there a dropout, under
    which the policy that is trained would not be the one that sampled.
    """

    rank: int = 0
    """Rank of the adapters; 0 trains the model's own weights."""
    alpha: int = 32
    """What an adapter adds is multiplied by alpha / rank."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Products of the decoder layers that have an adapter."""

    def __post_init__(self) -> None:
        _want(self.rank >= 0, "model.lora.rank", ">= 0", self.rank)
        _want(self.alpha >= 1, "model.lora.alpha", ">= 1", self.alpha)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy to train."""

    path: str
    """Model folder, or a name on the Hugging Face hub."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; trained weights and gradients stay float32. auto: bfloat16 on a GPU, float32 on a CPU."""
    freeze_vision: bool = False
    """Leave the vision tower as it is; with adapters it always is."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing; all but the results of matrix products and
    attention; or each layer whole, from its input."""
    compile: bool = False
    """Compile each decoder layer and vision block with torch.compile, once for all lengths."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        _want(bool(self.path), "model.path", "a model folder or a name on the hub", self.path)


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How weights, gradients and moments are shared out among ranks (FSDP2)."""

    replicas: int = 0
    """Copies of the sharded state, each on ranks of its own (HSDP); 0 for one a node, 1 to shard over all ranks."""
    reduce: Literal["last", "each"] = "last"
    """When gradients are summed over ranks: after the last micro-batch of an update, until which each rank keeps them
    whole in float32, or after each, which keeps shards alone."""
    cpu_offload: bool = False
    """Keep shards, gradients and moments in CPU memory, where AdamW then runs; the GPU has what it computes with."""

    def __post_init__(self) -> None:
        _want(self.replicas >= 0, "sharding.replicas", ">= 0", self.replicas)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How far the images of training may be changed, under which phrase and boxes stay true (docs/data/loading.md)."""

    flip: float = 0.0
    """Share of the prompts whose image is mirrored, left and right swapped in the phrase, where that is safe."""
    shift: float = 0.0
    """Largest shift, as a fraction of width and height."""
    scale: float = 0.0
    """Largest change of size: 0.1 for 0.9 to 1.1."""
    intensity: float = 0.0
    """Largest change of contrast and of brightness: 0.1 for 0.9 to 1.1 each."""

    def __post_init__(self) -> None:
        _want(0 <= self.flip <= 1, "data.augment.flip", "0 <= flip <= 1", self.flip)
        for name in ("shift", "scale", "intensity"):
            value = getattr(self, name)
            _want(0 <= value <= 0.3, f"data.augment.{name}", f"0 <= {name} <= 0.3 (small changes)", value)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The records to train and evaluate on (docs/data/records.md)."""

    path: tuple[str, ...]
    """Folder that holds records.jsonl; several are one data set, to which each adds its splits."""
    weights: tuple[float, ...] = ()
    """Of each folder, its share of the prompts that are trained on, over the sum; without any, records count alike."""
    train_split: str = "train"
    """Split that is trained on."""
    curve_split: str = "val"
    """Split of the small evaluations while training."""
    test_split: str = "test"
    """Split of the evaluations before and after training."""
    min_pixels: int = 56 * 56
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = 1280 * 28 * 28
    """Larger images are reduced to this many pixels."""
    workers: int = 0
    """Processes of each rank that make the next prompts: they read, resize and tokenise; 0 for a thread of the rank.
    Changes nothing of the prompts."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        named = isinstance(self.path, tuple) and bool(self.path) and all(self.path)
        _want(named, "data.path", "the name of a folder, or of several", self.path)
        fitting = not self.weights or len(self.weights) == len(self.path)
        _want(fitting, "data.weights", f"as many as folders, {len(self.path)}, or none", self.weights)
        usable = all(0 <= weight < math.inf for weight in self.weights) and (not self.weights or any(self.weights))
        _want(usable, "data.weights", "numbers >= 0, one of them > 0", self.weights)
        in_order = 0 < self.min_pixels <= self.max_pixels
        _want(in_order, "data.min_pixels", "0 < min_pixels <= max_pixels", self.min_pixels)
        _want(0 <= self.workers <= 64, "data.workers", "0 to 64", self.workers)


Template = Literal["brief", "brief-chain", "plain", "patient-side", "chain-of-box"]

CHAINED: tuple[Template, ...] = ("brief-chain", "chain-of-box")
"""Templates that ask for a box after every region named while thinking."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How the model is asked."""

    template: Template = "patient-side"
    """Wording of the question; plain is MedGround-R1's, patient-side says whose left and right are meant, chain-of-box
    also asks for a box after every region named while thinking; brief and brief-chain are for small models, which were
    taught the one form or the other."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled."""

    prompts_per_step: int = 32
    """Prompts a step, over all ranks (B)."""
    group_size: int = 8
    """Completions sampled per prompt (G)."""
    max_new_tokens: int = 512
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the loss divides the logits by the same number."""
    top_k: int = 0
    """Draw from the top_k likeliest tokens alone; 0 for all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that have top_p of the probability."""
    old_logp: Literal["sampled", "rescored"] = "sampled"
    """Log-probabilities of the old policy: those that came with the tokens, or a training forward's."""
    max_rows: int = 256
    """Most completions decoded at once, per rank."""
    cache_gb: float = 8.0
    """Memory for keys and values of prompts and completions being decoded, per rank, in 10^9 bytes."""
    prefill_tokens: int = 8192
    """Most prompt tokens run at once before decoding, per rank."""

    def __post_init__(self) -> None:
        _want(self.prompts_per_step >= 1, "rollout.prompts_per_step", ">= 1", self.prompts_per_step)
        _want(
            self.group_size >= 2,
            "rollout.group_size",
            ">= 2 (advantages compare the completions of a group)",
            self.group_size,
        )
        _want(self.max_new_tokens >= 1, "rollout.max_new_tokens", ">= 1", self.max_new_tokens)
        _want(1e-6 <= self.temperature < math.inf, "rollout.temperature", "a number >= 1e-6", self.temperature)
        _want(self.top_k >= 0, "rollout.top_k", ">= 0", self.top_k)
        _want(0 < self.top_p <= 1, "rollout.top_p", "0 < top_p <= 1", self.top_p)
        _want(self.max_rows >= 1, "rollout.max_rows", ">= 1", self.max_rows)
        _want(0 < self.cache_gb < math.inf, "rollout.cache_gb", "a number > 0", self.cache_gb)
        _want(self.prefill_tokens >= 1, "rollout.prefill_tokens", ">= 1", self.prefill_tokens)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a completion earns: the weighted sum of its rewards (docs/rewards.md)."""

    format_weight: float = 1.0
    """Weight of the format reward (1 for a completion of exactly the template's form, else 0)."""
    spatial_weight: float = 1.0
    """Weight of the spatial reward."""
    spatial: Literal["soft", "hard", "giou", "stepped", "curriculum"] = "soft"
    """soft: the IoU itself; hard: 1 where the IoU exceeds the threshold; giou: (1 + GIoU) / 2; stepped: the fraction of
    several thresholds that it exceeds; curriculum: hard, its threshold raised as the policy improves."""
    threshold: float = 0.5
    """IoU threshold of the hard reward."""
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)
    """IoU thresholds of the stepped reward."""
    curriculum_start: float = 0.3
    """First IoU threshold of the curriculum."""
    curriculum_end: float = 0.8
    """Its last."""
    curriculum_window: int = 30
    """Groups that it looks back on."""
    curriculum_reward: float = 0.6
    """Mean reward over the window from which the threshold is raised."""
    curriculum_spread: float = 0.4
    """Largest deviation of the groups' mean rewards at which it is."""
    length_weight: float = 0.0
    """Weight of the length reward (0 to -1 over the last tokens before the limit)."""
    length_buffer: int = 128
    """Those tokens."""
    semantic_weight: float = 0.0
    """Weight of the semantic reward (whether the crop looks like the phrase to a frozen encoder)."""
    semantic: Literal["cosine", "contrast"] = "contrast"
    """cosine: of crop and phrase, the paper's; contrast: against other phrases and the whole image, times a prior on
    area."""
    encoder: str = ""
    """Encoder of the semantic reward: open_clip:PLACE, transformers:PLACE, medclip:FOLDER or phantom:FOLDER."""
    crop_context: float = 1.2
    """Sides of a crop, in those of the box."""
    custom: str = ""
    """A reward of your own, module:function; it takes a Batch (medground/rewards/batch.py), gives B x G numbers."""
    custom_weight: float = 1.0
    """Its weight."""

    def __post_init__(self) -> None:
        weights = [name for name in vars(self) if name.endswith("_weight")]
        for name in weights:
            _want(0 <= getattr(self, name) < math.inf, f"reward.{name}", "a number >= 0", getattr(self, name))
        _want(
            not self.semantic_weight or bool(self.encoder), "reward.encoder", "an encoder for the semantic reward", ""
        )
        _want(1 <= self.crop_context < math.inf, "reward.crop_context", "a number >= 1", self.crop_context)
        used = [getattr(self, name) for name in weights if name != "custom_weight" or self.custom]
        _want(sum(used) > 0, "reward.spatial_weight", "one weight > 0", 0.0)
        _want(0 <= self.threshold < 1, "reward.threshold", "0 <= threshold < 1", self.threshold)
        in_range = len(self.thresholds) > 0 and all(0 <= t < 1 for t in self.thresholds)
        _want(in_range, "reward.thresholds", "one or more, each 0 <= threshold < 1", self.thresholds)
        start, end = self.curriculum_start, self.curriculum_end
        _want(0 <= start < 1, "reward.curriculum_start", "0 <= threshold < 1", start)
        _want(start <= end < 1, "reward.curriculum_end", "curriculum_start <= threshold < 1", end)
        _want(self.curriculum_window >= 2, "reward.curriculum_window", ">= 2", self.curriculum_window)
        _want(0 <= self.curriculum_reward <= 1, "reward.curriculum_reward", "0 <= mean <= 1", self.curriculum_reward)
        _want(self.curriculum_spread >= 0, "reward.curriculum_spread", "a number >= 0", self.curriculum_spread)
        _want(self.length_buffer >= 1, "reward.length_buffer", ">= 1", self.length_buffer)
        _want(not self.custom or 0 < self.custom.find(":") < len(self.custom) - 1, "reward.custom",
              "module:function", self.custom)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The GRPO objective."""

    advantage: Literal["group", "none"] = "group"
    """group: subtract the group's mean and divide by its spread; none: subtract the mean only."""
    per_reward: bool = False
    """Divide each reward by its own spread within the group before they are weighed and summed (GDPO)."""
    drop_zero_spread: bool = False
    """Leave groups whose completions all earned the same out of the update, KL term and all."""
    resample_prompts: int = 0
    """With drop_zero_spread: prompts that a step may ask beyond its own, over all ranks, one for each group without
    spread, and again for those of them that have none."""
    mask_truncated: bool = False
    """Leave completions that were cut at the token limit out of the update; they still count in their group's mean."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "cispo", "sapo"] = "dapo"
    """Objective of a token and what the sum is divided by: kernels/grpo_loss.py has the formulas."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Probability ratio of each token, or one for a sequence (GSPO)."""
    epsilon_low: float = 0.2
    """The ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The ratio is clipped above at 1 + epsilon_high; cispo caps its weight at epsilon_high itself (5.0, say)."""
    delta: float | None = None
    """Upper bound of the unclipped ratio (two-sided clipping), best above 1 + epsilon_high."""
    dual_clip: float | None = None
    """Most that the ratio can cost where the advantage is negative, above 1 (dual-clip PPO)."""
    beta: float = 0.04
    """Weight of the KL divergence from the reference policy; 0 keeps no reference."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence."""
    kl_ratio: bool = False
    """Multiply the divergence by the ratio: no bias off policy."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, a mean over the tokens."""
    sapo_temperature_pos: float = 1.0
    """Steepness of sapo's gate where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """Steepness of sapo's gate elsewhere."""
    inner_epochs: int = 1
    """Optimizer steps on each batch of completions."""
    micro_batch_tokens: int = 16384
    """Most tokens per forward pass and rank, a group's prompt counted once; changes memory, not the result."""

    def __post_init__(self) -> None:
        spare = self.resample_prompts
        _want(0 <= spare <= 1 << 20, "loss.resample_prompts", "0 to 2**20", spare)
        _want(self.drop_zero_spread or not spare, "loss.resample_prompts", "0 without loss.drop_zero_spread", spare)
        try:
            self.options(temperature=1.0, max_completion_length=1)
        except ValueError as error:
            raise ValueError(f"loss.{error}") from None
        divided = self.advantage != "none" or not self.per_reward
        _want(divided, "loss.per_reward", "advantage group, since none divides by no spread", self.advantage)
        _want(self.inner_epochs >= 1, "loss.inner_epochs", ">= 1", self.inner_epochs)
        _want(self.micro_batch_tokens >= 1, "loss.micro_batch_tokens", ">= 1", self.micro_batch_tokens)

    def options(self, *, temperature: float, max_completion_length: int) -> GrpoOptions:
        """The loss as the kernels take it."""
        names = {f.name for f in dataclasses.fields(GrpoOptions)} & {f.name for f in dataclasses.fields(self)}
        chosen = {name: getattr(self, name) for name in names}
        return GrpoOptions(**chosen, temperature=temperature, max_completion_length=max_completion_length)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a linear decay."""

    kind: Literal["adamw", "adamw-8bit"] = "adamw"
    """Moments in float32, or in 8 bits with a scale for each block of a row; the second wants torchao."""
    lr: float = 1e-6
    """Learning rate after the warm-up."""
    final_lr_fraction: float = 0.0
    """Learning rate at the last step, as a fraction of lr."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped: int = 3
    """Steps in a row that may leave the weights as they are because a gradient is not finite; one more ends the run."""

    def __post_init__(self) -> None:
        _want(0 < self.lr < math.inf, "optimizer.lr", "a number > 0", self.lr)
        fraction = self.final_lr_fraction
        _want(0 <= fraction <= 1, "optimizer.final_lr_fraction", "0 <= fraction <= 1", fraction)
        _want(self.warmup_steps >= 0, "optimizer.warmup_steps", ">= 0", self.warmup_steps)
        _want(0 <= self.beta1 < 1, "optimizer.beta1", "0 <= beta1 < 1", self.beta1)
        _want(0 <= self.beta2 < 1, "optimizer.beta2", "0 <= beta2 < 1", self.beta2)
        _want(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", "a number >= 0", self.weight_decay)
        _want(self.max_grad_norm > 0, "optimizer.max_grad_norm", "> 0", self.max_grad_norm)
        _want(self.max_skipped >= 0, "optimizer.max_skipped", ">= 0", self.max_skipped)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that stay on disk."""

    def __post_init__(self) -> None:
        _want(self.every >= 1, "checkpoint.every", ">= 1", self.every)
        _want(self.keep >= 1, "checkpoint.keep", ">= 1", self.keep)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Greedy evaluation on held-out records."""

    every: int = 25
    """Steps between the small evaluations on data.curve_split; 0 for none."""
    curve_records: int = 64
    """Records of a small evaluation, the first of the split."""

    def __post_init__(self) -> None:
        _want(self.every >= 0, "evaluation.every", ">= 0", self.every)
        _want(self.curve_records >= 1, "evaluation.curve_records", ">= 1", self.curve_records)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a vision-language model by GRPO to draw the box that a medical phrase speaks of."""

    out: str
    """Folder of the run; must not hold another run."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint, exactly; restarts by torchrun or SLURM do by themselves."""
    steps: int = 0
    """Batches of prompts to train on; 0 where epochs are given."""
    epochs: int = 0
    """Times that every training record is asked about, in place of steps; with data.weights, as many prompts."""
    seed: int = 0
    """Seed of the data order, of every sampled token and of new adapters."""
    samples_every: int = 10
    """Steps between the files of sampled completions (samples/); the first and last step always have one."""
    timeout_minutes: float = 20.0
    """Longest time in which no rank moves on; then the run ends and says who hangs, and in what."""
    model: ModelConfig
    data: DataConfig
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        one = min(self.steps, self.epochs) == 0 < max(self.steps, self.epochs)
        _want(one, "steps, epochs", "one of them > 0 and the other 0", (self.steps, self.epochs))
        _want(0 <= self.seed < 2**31, "seed", "0 <= seed < 2**31", self.seed)
        _want(self.samples_every >= 1, "samples_every", ">= 1", self.samples_every)
        _want(bool(self.out), "out", "a folder name", self.out)
        _want(0 < self.timeout_minutes < math.inf, "timeout_minutes", "a number > 0", self.timeout_minutes)

    def in_steps(self, records: int) -> "Config":
        """The same with steps in place of epochs, for so many training records; the last step may go past the end."""
        steps = self.steps or -(-self.epochs * records // self.rollout.prompts_per_step)
        return dataclasses.replace(self, steps=steps, epochs=0)


def save_config(config: Config, path: Path) -> None:
    """Write `config` as JSON, every value included, `resume` aside: it says how a run was started."""
    values = dataclasses.asdict(config)
    del values["resume"]
    path.write_text(json.dumps(values, indent=2) + "\n")


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote.

    Raises:
        ValueError: the file is no JSON object, or a key is unknown, missing, or of the wrong type.
    """
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: want a configuration file; {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    try:
        return _build(Config, values, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def differing_fields(ours: Config, theirs: Config) -> list[str]:
    """'field: ours, theirs' for every value that differs between two configurations, `resume` aside."""
    a, b = _flat(dataclasses.asdict(ours)), _flat(dataclasses.asdict(theirs))
    return [f"{name}: {a[name]!r} against {b[name]!r}" for name in a if a[name] != b[name] and name != "resume"]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'configuration'}: want an object; got {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where}{key}: unknown key; known are {', '.join(hints)}")
    kept = {}
    for known in dataclasses.fields(kind):
        name = where + known.name
        if known.name in values:
            kept[known.name] = _value(hints[known.name], values[known.name], name)
        elif known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name}: missing")
    return kind(**kept)


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name + ".")
    if typing.get_origin(hint) is Literal:
        _want(value in typing.get_args(hint), name, f"one of {', '.join(typing.get_args(hint))}", value)
        return value
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]  # one alone may stand without brackets
        return tuple(_value(typing.get_args(hint)[0], item, name) for item in items)
    if type(None) in typing.get_args(hint):  # a number or null
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    if hint is float and type(value) is int:
        return float(value)
    if typing.get_origin(hint) is tuple:  # of any number of one kind
        _want(isinstance(value, (list, tuple)), name, "a list", value)
        return tuple(_value(typing.get_args(hint)[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    _want(type(value) is hint, name, hint.__name__, value)
    return value
