"""Sampling: the generator's known answers, the distribution, independence of neighbours."""

import pytest
import torch

from medground_kernels.sample_token import _philox, _uniform, sample_token

pytestmark = pytest.mark.usefixtures("on_the_gpu")


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    # the known-answer file of Random123 (Salmon et al. 2011)
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, want):
    words = _philox(*(torch.tensor([[c]]) for c in counter), torch.tensor([[key]]))
    assert " ".join(f"{int(word):08x}" for word in words) == want


def test_noise_is_finite_at_both_ends():
    bits = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    u = _uniform(bits)
    assert ((u > 0) & (u < 1)).all()
    assert torch.isfinite(-(-u.log()).log()).all()


def test_an_impossible_token_is_never_drawn():
    logits = torch.full((200, 100_000), -20.0)
    logits[:, 77] = 20.0
    assert (sample_token(logits, temperature=1.0, seeds=torch.arange(200), step=0).token == 77).all()


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
    draws = 20_000
    seeds = torch.arange(draws)
    token = sample_token(logits.expand(draws, -1), temperature=0.8, seeds=seeds, step=3).token
    share = torch.bincount(token, minlength=5) / draws
    want = (logits[0] / 0.8).softmax(-1)
    # five standard deviations of a share
    assert ((share - want).abs() < 5 * (want * (1 - want) / draws).sqrt()).all()


def test_steps_and_seeds_draw_apart_and_again_alike():
    logits = torch.zeros(1000, 50)
    seeds = torch.arange(1000)
    first = sample_token(logits, temperature=1.0, seeds=seeds, step=0).token
    again = sample_token(logits, temperature=1.0, seeds=seeds, step=0).token
    later = sample_token(logits, temperature=1.0, seeds=seeds, step=1).token
    assert torch.equal(first, again)
    assert (first == later).float().mean() < 0.06
    assert first.unique().numel() == 50


def test_a_row_does_not_see_its_neighbours():
    torch.manual_seed(0)
    logits, seeds = torch.randn(9, 37), torch.arange(100, 109)
    together = sample_token(logits, temperature=1.0, seeds=seeds, step=5)
    for row in range(9):
        alone = sample_token(logits[row : row + 1], temperature=1.0, seeds=seeds[row : row + 1], step=5)
        assert alone.token == together.token[row]
        assert alone.logp == together.logp[row]


def test_logp_is_that_of_the_full_softmax():
    torch.manual_seed(0)
    logits, seeds = torch.randn(6, 21), torch.arange(6)
    out = sample_token(logits, temperature=0.5, seeds=seeds, step=0, banned=torch.tensor([3, 4]))
    want = (logits / 0.5).log_softmax(-1).gather(-1, out.token[:, None])[:, 0]
    torch.testing.assert_close(out.logp, want)


def test_banned_tokens_never_come_and_greedy_takes_the_best_other():
    logits = torch.zeros(500, 4)
    logits[:, 2] = 9
    seeds = torch.arange(500)
    sampled = sample_token(logits, temperature=1.0, seeds=seeds, step=0, banned=torch.tensor([2]))
    assert 2 not in sampled.token
    logits[:, 1] = 1
    assert (sample_token(logits, temperature=0.0, seeds=seeds, step=0, banned=torch.tensor([2])).token == 1).all()
    assert (sample_token(logits, temperature=0.0, seeds=seeds, step=0).token == 2).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="seeds"):
        sample_token(torch.zeros(2, 3), temperature=1.0, seeds=torch.zeros(3, dtype=torch.int64), step=0)
    with pytest.raises(ValueError, match="-1"):
        sample_token(torch.zeros(2, 3), temperature=-1.0, seeds=torch.zeros(2, dtype=torch.int64), step=0)
