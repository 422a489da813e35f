"""Top-k and top-p: what they leave, against V * V comparisons in float64."""

import math

import pytest
import torch

import medground_kernels.logit_threshold as module
from medground_kernels.logit_threshold import logit_threshold, logit_threshold_reference

pytestmark = pytest.mark.usefixtures("path")


def assert_leaves_the_same(logits, banned=None, **options):
    allowed = logits.double() if banned is None else logits.double().index_fill(-1, banned, -math.inf)
    ours = logit_threshold(logits, banned=banned, **options)
    truth = logit_threshold_reference(logits.double(), banned=banned, **options)
    assert ours.dtype == torch.float32 and ours.shape == truth.shape
    left = allowed >= truth[:, None]
    assert torch.equal(allowed >= ours[:, None], left)
    return left.sum(-1)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 512)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (2, 1.0), (40, 1.0), (1201, 1.0), (0, 0.05), (0, 0.5), (0, 0.97), (50, 0.8)]
)
def test_leaves_what_brute_force_leaves(dtype, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(2, 1201).mul(4).to(dtype)
    logits[0] = -logits[0].abs() - 1  # negative numbers are ordered the other way round
    left = assert_leaves_the_same(logits, temperature=0.7, top_k=top_k, top_p=top_p)
    if dtype == torch.float32 and top_p == 1:
        assert left.tolist() == [top_k] * 2


@pytest.mark.usefixtures("small_blocks")
def test_the_temperature_moves_top_p():
    torch.manual_seed(0)
    logits = torch.randn(1, 700)
    cold = assert_leaves_the_same(logits, temperature=0.3, top_p=0.8)
    warm = assert_leaves_the_same(logits, temperature=3.0, top_p=0.8)
    assert cold < warm


@pytest.mark.usefixtures("small_blocks")
def test_banned_tokens_do_not_count():
    torch.manual_seed(0)
    logits = torch.randn(1, 1100).mul(3)
    banned = torch.tensor([0, 511, 512, 512, 1099])
    logits[:, banned] = 40.0  # the largest, at the edges of blocks
    assert assert_leaves_the_same(logits, banned, temperature=1.0, top_k=7).tolist() == [7]
    assert assert_leaves_the_same(logits, banned, temperature=1.0, top_p=0.6) > 1
    out = logit_threshold(logits, temperature=1.0, top_k=7, banned=banned)
    assert out < 40


def test_equal_logits_stay_together():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, -0.0, -3.0]])
    assert assert_leaves_the_same(logits, temperature=1.0, top_k=2).tolist() == [3]
    assert assert_leaves_the_same(logits, temperature=1.0, top_k=5).tolist() == [6]
    assert assert_leaves_the_same(logits, temperature=1.0, top_p=0.3).tolist() == [3]
    assert assert_leaves_the_same(torch.full((1, 9), 5.0), temperature=1.0, top_p=0.01).tolist() == [9]


def test_top_p_is_of_what_top_k_leaves():
    logits = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1]]).log()
    # of all: 0.4 + 0.3 < 0.72; of the first two, 0.4 / 0.7 < 0.72 < 1
    assert assert_leaves_the_same(logits, temperature=1.0, top_p=0.72).tolist() == [5]
    assert assert_leaves_the_same(logits, temperature=1.0, top_k=2, top_p=0.72).tolist() == [2]
    assert assert_leaves_the_same(logits, temperature=1.0, top_k=2, top_p=0.55).tolist() == [1]
    assert assert_leaves_the_same(logits, temperature=1.0, top_p=0.55).tolist() == [2]


def test_one_token_always_stays():
    logits = torch.tensor([[0.0, 1e4, -1e4], [-1e4, -9e3, -8e3]])
    for top_p in (1e-60, 1e-45, 1e-9, 0.5):
        assert assert_leaves_the_same(logits, temperature=1.0, top_p=top_p).tolist() == [1, 1]
    assert logit_threshold(torch.tensor([[3.0]]), temperature=1.0, top_k=1, top_p=0.5).item() <= 3


@pytest.mark.parametrize("top", [1e4, -1e4])
def test_large_logits(top):
    logits = torch.tensor([[0.0, 0.5, 1.0, 1.5, -9.0]]) + top
    assert assert_leaves_the_same(logits, temperature=1.0, top_p=0.6).tolist() == [2]


def test_what_lies_beyond_the_row_does_not_count():
    wide = torch.tensor([[1.0, 2.0, 3.0, 40.0], [3.0, 1.0, 2.0, 50.0]])
    assert logit_threshold(wide[:, :3], temperature=1.0, top_k=2).tolist() == [2, 2]


def test_ids_outside_the_vocabulary_ban_nothing_in_the_kernel(path):
    if path == "torch":
        pytest.skip("a CPU refuses them")
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    banned = torch.tensor([2**32 + 3, -(2**32) + 3, -1, 4, 2])
    assert logit_threshold(logits, temperature=1.0, top_k=2, banned=banned).tolist() == [2]


def test_impossible_tokens_add_nothing():
    logits = torch.full((1, 300), -math.inf)
    logits[0, 3:6] = torch.tensor([1.0, 2.0, 3.0])
    assert assert_leaves_the_same(logits, temperature=1.0, top_k=2).tolist() == [2]
    assert logit_threshold(logits, temperature=1.0, top_k=10).item() == -math.inf
    assert assert_leaves_the_same(logits, temperature=1.0, top_p=0.9).tolist() == [2]


def test_a_row_of_a_real_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 65_536)  # the interpreter's time is the number of blocks
    torch.manual_seed(0)
    logits = torch.randn(1, 151_936).mul(2).bfloat16()
    falling = logits[0].float().sort(descending=True).values
    threshold = logit_threshold(logits, temperature=1.0, top_k=50)
    assert (logits.float() >= threshold).sum() == (falling >= falling[49]).sum()
