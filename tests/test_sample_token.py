"""Sampling: the distribution, log-probabilities against float64, independence of neighbours and of the cut."""

import math

import pytest
import torch

import medground_kernels.sample_token as module
from medground_kernels.sample_token import sample_token, sample_token_reference

pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture(params=[(1, 64), (1 << 20, 64), (8, 256)], ids=["one program", "a block each", "few blocks each"])
def cut(request, monkeypatch):
    """Ways in which kernels cut a row, all of which have several blocks in 1000 columns."""
    programs, block = request.param
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    monkeypatch.setattr(module, "BLOCK", block)


@pytest.fixture
def large_blocks(monkeypatch):
    """The interpreter's time is the number of blocks."""
    monkeypatch.setattr(module, "BLOCK", 32_768)


def assert_true(logits, out=None, **options):
    """The draw of the reference in float64, and its log-probabilities."""
    options = {"temperature": 0.7, "seeds": torch.arange(len(logits)) * 7**20 + 3, "step": 11} | options
    out = out or sample_token(logits, **options)
    truth = sample_token_reference(logits.double(), **options)
    assert out.token.dtype == torch.int64 and out.logp.dtype == out.full_logp.dtype == torch.float32
    assert out.token.tolist() == truth.token.tolist()
    torch.testing.assert_close(out.logp.double(), truth.logp, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out.full_logp.double(), truth.full_logp, atol=2e-6, rtol=1e-6)
    return out


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 40, "top_p": 0.95}], ids=["", "greedy", "top"])
def test_everything_at_once_in_a_few_blocks(options, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "_PROGRAMS", 4)  # two splits of two blocks
    torch.manual_seed(0)
    logits = torch.randn(2, 250).mul(3)
    logits[:, [7, 140]] += 9
    banned = torch.tensor([249, 7, 130, 7])
    assert_true(logits, banned=banned, step=torch.tensor([5, 2**32 - 1]), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 2), (2, 9001), (0, 5)])
def test_draws_and_log_probabilities_are_those_of_the_definition(rows, vocab, dtype, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8192)
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab).mul(3).to(dtype)
    out = assert_true(logits)
    torch.testing.assert_close(out.logp, out.full_logp)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_cut_draws_the_same(dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, 999).mul(3).to(dtype)
    logits[1, -1] += 15  # the running maximum moves in the last block
    logits[0, :200] = -math.inf  # whole blocks
    assert_true(logits, banned=torch.tensor([256, 998, 700]))
    assert_true(logits, temperature=0.0)


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize(("vocab", "dtype"), [(151_936, torch.bfloat16), (152_064, torch.float32)])
def test_real_vocabularies(vocab, dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, vocab).mul(2).to(dtype)
    logits[0, -7:] = 30.0
    options = {"temperature": 1.0, "seeds": torch.tensor([5, 2**62 + 9]), "step": 4000}
    out = sample_token(logits, **options)
    z = logits.double()
    noisy = z + module.gumbel_noise(options["seeds"], 4000, vocab, torch.float64)
    assert out.token.tolist() == noisy.argmax(-1).tolist()
    torch.testing.assert_close(out.logp.double(), z.log_softmax(-1).gather(-1, out.token[:, None])[:, 0])


def test_draws_follow_the_distribution(path):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0, 9.0]])
    draws = 20_000 if path == "torch" or logits.is_cuda else 30
    token = sample_token(
        logits.expand(draws, -1), temperature=0.8, seeds=torch.arange(draws), step=3, banned=torch.tensor([5])
    ).token
    want = (logits[0, :5] / 0.8).softmax(-1) * draws
    chi_square = ((torch.bincount(token, minlength=6)[:5] - want) ** 2 / want).sum()
    # four degrees of freedom: once in 50,000
    assert token.max() < 5 and chi_square < 27


def test_truncated_draws_follow_what_is_left(path):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]]).bfloat16()  # half the passes
    draws = 5000 if path == "torch" or logits.is_cuda else 8
    out = sample_token(logits.expand(draws, -1), temperature=1.0, seeds=torch.arange(draws), step=0, top_k=3, top_p=0.9)
    share = (out.token == 4).float().mean()
    want = 1 / (1 + math.exp(-1))  # 0.665 + 0.245 >= 0.9: tokens 4 and 0
    assert set(out.token.tolist()) == {0, 4}
    assert abs(share - want) < 4 * math.sqrt(want * (1 - want) / draws)
    torch.testing.assert_close(out.logp.exp(), torch.where(out.token == 4, want, 1 - want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (30, 0.5), (1, 1.0), (600, 1.0)])
def test_logp_is_of_the_truncated_distribution_full_logp_of_the_whole(top_k, top_p, dtype, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 256)  # several blocks a program
    monkeypatch.setattr(module, "_PROGRAMS", 4)
    torch.manual_seed(0)
    logits = torch.randn(2, 600).mul(2).to(dtype)
    logits[0, 599] = 9.0
    logits[:, 17] = 12.0
    out = assert_true(logits, top_k=top_k, top_p=top_p, banned=torch.tensor([17]))
    assert (out.logp > out.full_logp + 1).all()


@pytest.mark.parametrize("gap", [-1000.0, -1.0, 0.5, 1000.0])
def test_banned_tokens_stay_in_full_logp_alone(gap):
    torch.manual_seed(0)
    logits = torch.randn(2, 40)
    banned = torch.tensor([39, 0, 39, 7, 39])  # each counts once
    logits[:, banned] = logits.max() + gap
    out = assert_true(logits, temperature=1.0, banned=banned)
    assert not torch.isin(out.token, banned).any()


def test_ids_outside_the_vocabulary_ban_nothing_on_a_gpu(path):
    if path == "torch":
        pytest.skip("a CPU refuses them")
    logits, seeds = torch.zeros(1, 9), torch.tensor([4])
    logits[0, 2], logits[0, 8] = 20, 30
    logits = logits[:, :8]  # what lies beyond would show
    want = module._launch(logits, 1.0, None, seeds, torch.tensor([0]), torch.tensor([2]))
    out = module._launch(logits, 1.0, None, seeds, torch.tensor([0]), torch.tensor([8, -1, 2, 2**32 + 3, -(2**32)]))
    assert want == out and out.token != 2


@pytest.mark.parametrize("top", [1e4, -1e4])
def test_large_logits(top):
    torch.manual_seed(0)
    logits = torch.randn(3, 1500) * 2 + top
    logits[1, :1100] = -1e4
    logits[2, 0], logits[2, 1499] = 1e4, 9.9995e3
    seeds = torch.arange(3)
    out = sample_token(logits, temperature=0.7, seeds=seeds, step=0)
    truth = (logits.double() / 0.7).log_softmax(-1).gather(-1, out.token[:, None])[:, 0]
    for logp in (out.logp, out.full_logp):
        torch.testing.assert_close(logp.double(), truth, atol=2e-6, rtol=1e-6)
    assert out.token[1] >= 1100 or top < 0


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((3, 2500), -math.inf)
    logits[0, 2400] = -50.0  # the only possible one
    logits[1, 2000:2003] = torch.tensor([-1e4, -1e4, -1e4])
    out = assert_true(logits[:2])
    assert out.token[0] == 2400 and out.logp[0] == 0
    assert_true(logits[:2], top_k=2, banned=torch.tensor([2001]))
    for options in ({"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}):
        none = sample_token(logits[2:], seeds=torch.tensor([1]), step=0, **options)
        assert none.token.item() == 0 and none.logp.isnan().all() and none.full_logp.isnan().all()
    logits[2, 0] = 3.0  # impossible, because banned
    for temperature in (0.0, 1.0):
        none = sample_token(
            logits[2:], seeds=torch.tensor([1]), step=0, temperature=temperature, banned=torch.tensor([0])
        )
        assert none.logp.isnan().all() and none.full_logp.isnan().all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"banned": [250]}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_not_hidden(options, bad):
    logits = torch.zeros(2, 300)
    logits[1, 250] = bad
    options = {"temperature": 1.0, "seeds": torch.arange(2), "step": 0} | options
    if "banned" in options:
        options["banned"] = torch.tensor(options["banned"])
    out = sample_token(logits, **options)
    assert out.logp.isnan().tolist() == out.full_logp.isnan().tolist() == [False, True]
    assert ((out.token >= 0) & (out.token < 300)).all()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(
    "best", [[5, 69], [66, 5], [10, 64], [999, 998], [0, 1, 2], [511, 512], [3, 515, 260], [257, 999]]
)
def test_greedy_takes_the_lowest_of_equals(best):
    logits = torch.zeros(1, 1000)
    logits[0, best] = 2.0
    out = sample_token(logits, temperature=0.0, seeds=torch.tensor([0]), step=0, top_k=1, top_p=0.1)
    assert out.token.item() == min(best) and out.logp.item() == 0
    torch.testing.assert_close(out.full_logp, logits.log_softmax(-1)[:, min(best)])


def test_greedy_does_not_take_what_is_banned():
    logits = torch.tensor([[0.0, 1.0, 9.0, -5.0]])
    for banned, best in ((None, 2), ([2], 1), ([2, 1], 0), ([0, 1, 2], 3)):
        ids = None if banned is None else torch.tensor(banned)
        assert assert_true(logits, temperature=0.0, banned=ids).token.item() == best


def test_steps_and_seeds_draw_apart_and_again_alike():
    logits = torch.zeros(10, 999)
    seeds = torch.arange(10)
    first = sample_token(logits, temperature=1.0, seeds=seeds, step=0).token
    again = sample_token(logits, temperature=1.0, seeds=seeds, step=0).token
    later = sample_token(logits, temperature=1.0, seeds=seeds, step=2**32 - 1).token
    assert torch.equal(first, again)
    assert (first == later).sum() < 2 and first.unique().numel() > 8


def test_each_row_may_be_at_its_own_step():
    torch.manual_seed(0)
    logits, seeds, steps = torch.randn(3, 500), torch.arange(3), torch.tensor([0, 9, 2**32 - 1])
    together = sample_token(logits, temperature=1.0, seeds=seeds, step=steps)
    for row, step in enumerate(steps.tolist()):
        alone = sample_token(logits[row, None], temperature=1.0, seeds=seeds[row, None], step=step)
        assert alone.token == together.token[row]


def test_a_row_does_not_see_its_neighbours(monkeypatch):
    monkeypatch.setattr(module, "_TORCH_ELEMENTS", 5000)  # two rows at once
    torch.manual_seed(0)
    logits, seeds = torch.randn(4, 2037), torch.arange(100, 104)
    together = sample_token(logits, temperature=1.0, seeds=seeds, step=5)
    for row in range(4):
        alone = sample_token(logits[row : row + 1], temperature=1.0, seeds=seeds[row : row + 1], step=5)
        assert alone.token == together.token[row]
        torch.testing.assert_close(alone.logp[0], together.logp[row])


def test_rows_may_lie_apart():
    torch.manual_seed(0)
    wide, seeds = torch.randn(4, 60), torch.arange(8)[::2]
    for view in (wide[:, 5:55], wide[::2, :50], wide[:1, :50].expand(4, 50)):
        options = {"temperature": 1.0, "seeds": seeds[: len(view)], "step": 2}
        apart, packed = sample_token(view, **options), sample_token(view.contiguous(), **options)
        torch.testing.assert_close(apart, packed, rtol=0, atol=0)
    assert_true(wide.bfloat16()[:2, 5:55], seeds=seeds[:2], banned=torch.arange(9)[::3], top_k=9)


def test_mistakes_are_named(path):
    logits, seeds = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)

    def wrong(match, logits=logits, **options):
        options = {"temperature": 1.0, "seeds": seeds, "step": 0} | options
        with pytest.raises(ValueError, match=match):
            sample_token(logits, **options)

    wrong(r"\(2, 8\), \(3,\)", seeds=torch.zeros(3, dtype=torch.int64))
    wrong("int32", seeds=seeds.int())
    wrong(r"got \(2, 0\)", logits=logits[:, :0])
    wrong("float64", logits=logits.double())
    wrong("unit stride", logits=torch.zeros(8, 2).T)
    wrong("got -1", temperature=-1.0)
    wrong("got 1e-07", temperature=1e-7)
    wrong("got inf", temperature=math.inf)
    wrong("got nan", temperature=math.nan)
    wrong("got -1, 1.0", top_k=-1)
    wrong("got 0, 0.0", top_p=0.0)
    wrong("got 0, 1.5", top_p=1.5)
    wrong("got -1", step=-1)
    wrong("got 4294967296", step=2**32)
    wrong(r"want step \[R\] int64; got \(1,\)", step=seeds[:1])
    wrong("int32", step=seeds.int())
    wrong(r"\(65,\)", banned=torch.zeros(65, dtype=torch.int64))
    wrong("int32", banned=torch.zeros(1, dtype=torch.int32))
    if not logits.is_cuda:
        wrong("V - 1 = 7; got .*8", banned=torch.tensor([1, 8]))
        wrong("got .*-1", banned=torch.tensor([-1]))
        wrong("got all 8", banned=torch.arange(8))
