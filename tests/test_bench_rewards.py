"""The benchmark of rewards at a small size: both ways score alike. Nothing here looks at how fast anything was."""

import numpy as np
import pytest
import torch

from bench.rewards import G, ours, pair_iou, peers, step_groups
from medground.config import RewardConfig
from medground.datasets.images import read_image
from medground.datasets.manifest import load_records
from medground.encoder_tools import BuildConfig, build_encoder
from medground.rewards.total import Scorer
from medground.scoring import set_iou


def test_both_ways_pay_alike(phantoms, tmp_path):
    build_encoder(BuildConfig(data=str(phantoms), out=str(tmp_path / "encoder"), steps=2))
    train = [example for example in load_records(phantoms) if example.split == "train"]
    groups = step_groups(phantoms, 3, train)
    config = RewardConfig(semantic_weight=1.0, semantic="cosine", encoder=f"phantom:{tmp_path / 'encoder'}")
    mine = ours(groups, Scorer(config, "brief", 64, examples=train))
    films = [read_image(phantoms / group.prompt.example.image) for group in groups]
    theirs = peers(groups, config.encoder, films)
    # PIL cuts whole pixels and rounds to bytes
    assert mine.shape == theirs.shape == (3, G) and (mine - theirs.clamp(min=0)).abs().median() < 0.1
    assert torch.equal(mine, ours(groups, Scorer(config, "brief", 64, examples=train)))


def test_the_loop_is_iou():
    draw = np.random.default_rng(0)
    for _ in range(50):
        a, b = (tuple(np.sort(draw.uniform(0, 9, (2, 2)), 0).flatten().tolist()) for _ in range(2))
        assert pair_iou(a, b) == pytest.approx(set_iou((a,), (b,)))
