"""A small job to plan: a model of which there is nothing but a configuration, and steps for it."""

from dataclasses import replace
from pathlib import Path

from medground.config import Config, DataConfig, LoraConfig, LossConfig, ModelConfig, RolloutConfig
from medground.plan.rehearsal import Job
from medground.plan.shapes import IMAGE_TOKENS, Architecture, config_of, model_config
from medground.plan.workload import longest_prompt

SHAPE = Architecture(64, 2, 4, 2, 96, 320, False, 2, 32, 2, 64, (1,))
G, C, TEXT, IMAGE = 4, 12, 20, 16  # completions of a prompt, their tokens, the prompt's
GROUP = TEXT + IMAGE + G * C


def made_config(folder: Path, shape: Architecture = SHAPE, **changes: object) -> Config:
    """For a model folder that holds a configuration alone; changes are fields of a section: loss_beta=0.04, say."""
    tokens = {name: shape.V - 1 - i for i, name in enumerate(IMAGE_TOKENS)}
    config_of(shape, tokens).save_pretrained(folder)
    config = Config(
        out="unused",
        steps=10,
        model=ModelConfig(path=str(folder), precision="float32"),
        data=DataConfig(path=("unused",), min_pixels=1, max_pixels=IMAGE * 784),
        rollout=RolloutConfig(
            prompts_per_step=8, group_size=G, max_new_tokens=C, max_rows=8, cache_gb=0.001, prefill_tokens=100
        ),
        loss=LossConfig(beta=0.0, micro_batch_tokens=2 * GROUP),
    )
    for name, value in changes.items():
        section, field = name.split("_", 1)
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def made_job(config: Config) -> Job:
    return Job(longest_prompt(config, TEXT), model_config(config.model.path))


def lora(rank: int = 4) -> dict[str, object]:
    return {"model_lora": LoraConfig(rank=rank)}
