"""Presets: they can be read back, stay out of one another's way, and fit the GPU that they are named after."""

import re

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.random_model import ARCHITECTURES, SIZES, make_config, make_processor
from medground.config import load_config, save_config
from medground.lora import add_adapters
from medground.presets import DATA_SETS, PRESETS, listing


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_a_round_trip_through_its_file(name, tmp_path):
    description, config = PRESETS[name]
    assert description.endswith(".")
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_presets_leave_no_other_run_in_the_way():
    folders = [config.out for _, config in PRESETS.values()]
    assert len(set(folders)) == len(folders)


def test_the_listing_has_every_preset():
    lines = listing().splitlines()
    assert len(lines) < 12 and max(map(len, lines)) <= 110
    named = {name.replace("DATA", data) for name in re.findall(r"^  (\S+)", listing(), re.M) for data in DATA_SETS}
    assert named == PRESETS.keys()


def test_the_papers_settings():
    for name, (_, config) in PRESETS.items():
        if name != "demo":
            rollout, loss = config.rollout, config.loss
            assert (config.epochs, rollout.group_size, rollout.temperature, loss.beta) == (2, 8, 1.0, 0.04)
            assert config.model.lora.rank or config.optimizer.lr == 1e-6
            assert any(config.data.path == (f"data/{data}",) and data in name for data in DATA_SETS)


@pytest.mark.parametrize("name", [name for name in PRESETS if "ms-cxr-lora" in name])
def test_a_gpu_holds_what_its_preset_keeps(name: str):
    """Frozen weights, merged ones, adapters with gradients and moments, keys and values; a fifth is for the rest."""
    pytest.importorskip("peft")
    size, memory_gb = re.fullmatch(r"qwen2.5-vl-(3b|7b)-ms-cxr-lora-(\d+)gb", name).groups()
    config, shape = PRESETS[name][1], ARCHITECTURES[size]
    with torch.device("meta"):
        vlm = Qwen2_5_VLForConditionalGeneration(make_config(shape, make_processor(shape.V, SIZES[size])))
    whole = sum(weight.numel() for weight in vlm.parameters())
    add_adapters(vlm, config.model.lora, seed=None)
    adapters = sum(weight.numel() for weight in vlm.parameters() if weight.requires_grad)
    merged = sum(weight.numel() for name, weight in vlm.named_parameters() if name.endswith("base_layer.weight"))
    kept = 2 * whole + 2 * merged + 16 * adapters + 1e9 * config.rollout.cache_gb
    assert kept <= 0.8 * 1e9 * int(memory_gb), f"{kept / 1e9:.1f} GB"
    print(f"{name}: {whole / 1e9:.2f}e9 weights, {merged / 1e9:.2f}e9 merged, {16 * adapters / 1e9:.1f} GB of adapters")
