"""Configurations: impossible values, and the JSON file that a run keeps of its own."""

import ast
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import medground.config
from medground.config import Config, DataConfig, ModelConfig, RolloutConfig, differing_fields, load_config, save_config
from medground.presets import PRESETS

SMALL = Config(out="runs/x", steps=2, model=ModelConfig(path="m"), data=DataConfig(path=("d",)))

NAN = math.nan
IMPOSSIBLE = {
    "out": [""],
    "steps": [0, -1],
    "epochs": [1, -1],  # 1: beside steps
    "seed": [-1, 2**31],
    "samples_every": [0],
    "timeout_minutes": [0.0, -1.0, NAN, math.inf],
    "model.lora.rank": [-1],
    "model.lora.alpha": [0],
    "sharding.replicas": [-1],
    "data.min_pixels": [0, -1, 10**9],  # the last: above max_pixels
    "data.max_pixels": [0, 56 * 56 - 1],
    "data.workers": [-1, 65],
    "data.augment.flip": [-0.1, 1.1, NAN],
    "data.augment.shift": [-0.1, 0.31, NAN],
    "data.augment.scale": [-0.1, 0.31, NAN],
    "data.augment.intensity": [-0.1, 0.31, NAN],
    "data.path": [(), ("",), ("d", ""), "d"],
    "data.weights": [(1.0, 1.0), (0.0,), (-1.0,), (NAN,), (math.inf,)],
    "rollout.prompts_per_step": [0],
    "rollout.group_size": [1, 0, -8],
    "rollout.max_new_tokens": [0],
    "rollout.temperature": [0.0, -1.0, NAN, math.inf],
    "reward.format_weight": [-0.1, NAN],
    "reward.spatial_weight": [-0.1, NAN],
    "reward.threshold": [-0.1, 1.0, NAN],
    "reward.thresholds": [(), (0.5, 1.0), (NAN,)],
    "reward.curriculum_start": [-0.1, 1.0, NAN],
    "reward.curriculum_end": [0.2, 1.0, NAN],
    "reward.curriculum_window": [1],
    "reward.curriculum_reward": [-0.1, 1.1, NAN],
    "reward.curriculum_spread": [-0.1, NAN],
    "reward.length_weight": [-0.1, NAN],
    "reward.length_buffer": [0],
    "reward.semantic_weight": [-0.1, NAN],
    "reward.crop_context": [0.9, NAN],
    "reward.custom": ["module", ":f", "m:"],
    "reward.custom_weight": [-0.1, NAN],
    "loss.epsilon_low": [-0.1, 1.0, NAN],
    "rollout.top_k": [-1],
    "rollout.top_p": [0.0, 1.1, NAN],
    "rollout.max_rows": [0],
    "rollout.cache_gb": [0.0, -1.0, NAN],
    "rollout.prefill_tokens": [0],
    "loss.epsilon_high": [-0.1, NAN],
    "loss.delta": [0.0, NAN],
    "loss.dual_clip": [1.0, NAN],
    "loss.beta": [-0.1, NAN],
    "loss.entropy_coef": [NAN],
    "loss.sapo_temperature_pos": [0.0, NAN],
    "loss.sapo_temperature_neg": [-1.0, NAN],
    "loss.inner_epochs": [0],
    "loss.micro_batch_tokens": [0],
    "loss.resample_prompts": [-1, 4, 1 << 21],
    "optimizer.lr": [0.0, -1e-6, NAN],
    "optimizer.final_lr_fraction": [-0.1, 1.1, NAN],
    "optimizer.warmup_steps": [-1],
    "optimizer.beta1": [-0.1, 1.0, NAN],
    "optimizer.beta2": [-0.1, 1.0, NAN],
    "optimizer.weight_decay": [-0.1, NAN],
    "optimizer.max_grad_norm": [0.0, -1.0, NAN],
    "optimizer.max_skipped": [-1],
    "checkpoint.every": [0],
    "checkpoint.keep": [0],
    "evaluation.every": [-1],
    "evaluation.curve_records": [0],
}


def sections(kind=Config, prefix=""):
    """('', Config), ('model.', ModelConfig), ...: every dataclass of the configuration, with its fields' prefix."""
    hints = typing.get_type_hints(kind)
    inner = [(f"{prefix}{name}.", part) for name, part in hints.items() if dataclasses.is_dataclass(part)]
    return [(prefix, kind), *(found for where, part in inner for found in sections(part, where))]


def with_value(config, name, value):
    """A copy of `config` with one field, named as on the command line, set to `value`."""
    section, _, rest = name.partition(".")
    if rest:
        value = with_value(getattr(config, section), rest, value)
    return dataclasses.replace(config, **{section: value})


def as_json(config, path):
    save_config(config, path)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name, value", [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_an_impossible_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name.rpartition(".")[2]) as refusal:
        with_value(SMALL, name, value)
    message = str(refusal.value)
    assert "want" in message and "got" in message
    assert message.startswith(name.rpartition(".")[0])


def test_every_number_has_values_that_are_refused():
    numbers = {
        prefix + name
        for prefix, kind in sections()
        for name, hint in typing.get_type_hints(kind).items()
        if {int, float} & {hint, *typing.get_args(hint)}
    }
    assert numbers <= IMPOSSIBLE.keys()


def test_a_reward_that_is_always_zero_is_refused():
    reward = dataclasses.replace(SMALL.reward, format_weight=0.0)
    with pytest.raises(ValueError, match=r"reward.spatial_weight: want one weight > 0"):
        dataclasses.replace(reward, spatial_weight=0.0)


def test_every_field_says_what_it_is():
    tree = ast.parse(Path(medground.config.__file__).read_text())
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in itertools.pairwise([*section.body, None]):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert described, f"{section.name}.{field.target.id} has no docstring"


def test_every_changed_value_survives_the_file(tmp_path):
    config = with_value(
        with_value(with_value(SMALL, "optimizer.lr", 3e-5), "loss.delta", 4.0), "model.lora.targets", "mlp"
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_epochs_become_steps_when_the_records_are_known():
    config = dataclasses.replace(SMALL, steps=0, epochs=2, rollout=RolloutConfig(prompts_per_step=4))
    assert config.in_steps(8) == dataclasses.replace(config, steps=4, epochs=0)
    assert config.in_steps(9).steps == 5, "every record as often as was asked"
    assert config.in_steps(1).steps == 1
    assert SMALL.in_steps(1000) == SMALL


def test_resume_is_not_part_of_what_is_saved(tmp_path):
    values = as_json(dataclasses.replace(SMALL, resume=True), tmp_path / "config.json")
    assert "resume" not in values
    assert load_config(tmp_path / "config.json") == SMALL


def test_a_file_may_leave_out_what_has_a_default(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"out": "runs/x", "steps": 2, "model": {"path": "m"}, "data": {"path": "d"}}')
    assert load_config(path) == SMALL


def test_a_whole_number_will_do_for_a_float(tmp_path):
    path = tmp_path / "config.json"
    values = as_json(SMALL, path)
    values["rollout"]["temperature"] = 2
    path.write_text(json.dumps(values))
    temperature = load_config(path).rollout.temperature
    assert temperature == 2.0 and type(temperature) is float


def test_one_folder_may_stand_alone_and_weights_may_be_whole(tmp_path):
    path = tmp_path / "config.json"
    values = as_json(SMALL, path)
    assert values["data"]["path"] == ["d"]
    values["data"]["path"] = "d"  # as earlier versions wrote it
    path.write_text(json.dumps(values))
    assert load_config(path) == SMALL
    values["data"] |= {"path": ["d", "e"], "weights": [3, 0.5]}
    path.write_text(json.dumps(values))
    data = load_config(path).data
    assert data.path == ("d", "e") and data.weights == (3.0, 0.5) and type(data.weights[0]) is float
    assert differing_fields(SMALL, load_config(path))[0] == "data.path: ('d',) against ('d', 'e')"


FAULTS = {
    "unknown key": (lambda v: v.update(stepz=3), "stepz: unknown key; known are out, "),
    "unknown key of a section": (lambda v: v["loss"].update(gamma=1), "loss.gamma: unknown key; known are advantage"),
    "missing key": (lambda v: v.pop("out"), "out: missing"),
    "neither steps nor epochs": (
        lambda v: v.pop("steps"),
        "steps, epochs: want one of them > 0 and the other 0; got (0",
    ),
    "missing section": (lambda v: v.pop("model"), "model: missing"),
    "missing key of a section": (lambda v: v["data"].pop("path"), "data.path: missing"),
    "text for a number": (lambda v: v.update(steps="2"), "steps: want int; got '2'"),
    "fraction for a whole number": (lambda v: v.update(steps=2.5), "steps: want int; got 2.5"),
    "truth for a number": (lambda v: v.update(steps=True), "steps: want int; got True"),
    "number for a truth": (lambda v: v["model"].update(freeze_vision=1), "model.freeze_vision: want bool; got 1"),
    "null for a number": (lambda v: v["optimizer"].update(lr=None), "optimizer.lr: want float; got None"),
    "unknown key of an inner section": (lambda v: v["model"]["lora"].update(r=1), "model.lora.r: unknown key; known"),
    "number among folders": (lambda v: v["data"].update(path=["d", 1]), "data.path: want str; got 1"),
    "value for a section": (lambda v: v.update(loss=3), "loss"),
    "unknown choice": (lambda v: v["loss"].update(kl="k4"), "loss.kl: want one of k1, k2, k3; got 'k4'"),
    "impossible value": (lambda v: v["rollout"].update(group_size=1), "rollout.group_size: want >= 2"),
}


@pytest.mark.parametrize("spoil, message", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_file_is_named(spoil, message, tmp_path):
    path = tmp_path / "config.json"
    values = as_json(SMALL, path)
    spoil(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError) as fault:
        load_config(path)
    assert str(fault.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("text, message", [("{", "not JSON"), ("", "not JSON"), ("[1]", "want an object")])
def test_a_file_that_holds_no_configuration_is_refused(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as fault:
        load_config(path)
    assert str(path) in str(fault.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent.json: want a configuration file"):
        load_config(tmp_path / "absent.json")


def test_differing_fields_are_named_with_both_values():
    other = dataclasses.replace(with_value(SMALL, "optimizer.lr", 1e-3), seed=7, resume=True)
    assert differing_fields(SMALL, other) == ["seed: 0 against 7", "optimizer.lr: 1e-06 against 0.001"]
    assert differing_fields(SMALL, with_value(SMALL, "model.lora.rank", 4)) == ["model.lora.rank: 0 against 4"]
    assert differing_fields(SMALL, dataclasses.replace(SMALL, resume=True)) == []


def test_the_configuration_answers_without_the_heavy_imports():
    code = (
        "import sys, medground.config; print(sorted({'torch', 'transformers', 'numpy', 'tyro'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="want a configuration file"):
        load_config(tmp_path)


@pytest.mark.parametrize("value", ["Infinity", "NaN"])
def test_infinite_numbers_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "config.json"
    save_config(PRESETS["demo"][1], path)
    path.write_text(path.read_text().replace('"lr": 0.0007', f'"lr": {value}'))
    with pytest.raises(ValueError, match=r"optimizer\.lr: want a number > 0"):
        load_config(path)
