"""Sums over a sequence's tokens, and over all of them, against their definitions: in plain torch and as kernels."""

import math

import pytest
import torch

import medground_kernels.grpo_sums as module
from medground_kernels.grpo_options import GrpoOptions
from medground_kernels.grpo_sums import finish, sequence_sums
from medground_kernels.grpo_terms import Scored

pytestmark = pytest.mark.usefixtures("path", "small_blocks", "guarded")
LENGTHS = [3, 0, 8, 1, 9, 21, 2, 1, 16, 4, 5]  # more sequences than a block has, and of more tokens


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)


@pytest.fixture
def guarded(monkeypatch):
    """Memory that an op takes for its results starts as rubbish and is followed by more of it, which must stay."""
    empty, taken = torch.empty, []

    def guarded_empty(*shape, **options):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        memory = empty(shape.numel() + 50, **options)
        rubbish = math.nan if memory.is_floating_point() else -7
        taken.append((memory.fill_(rubbish), shape.numel()))
        return memory[: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    yield
    for memory, size in taken:
        rest = memory[size:]
        assert (rest.isnan() if rest.is_floating_point() else rest == -7).all()


def between(values, rubbish):
    """The same values with rubbish before and behind."""
    edge = values.new_full((30,), rubbish)
    return torch.cat([edge, values, edge])[30 : 30 + len(values)]


def made_up(lengths, *, masked=True):
    """Tokens of sequences: some masked, which hold NaN; all of the fourth sequence, not the only one of the eighth."""
    torch.manual_seed(0)
    N, cu_seqlens = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    logp, old_logp, ref_logp = (-torch.rand(N) * 3 for _ in range(3))
    targets = torch.randint(0, 3, (N,))
    if masked:
        targets[2::3] = -1
        targets[cu_seqlens[3] : cu_seqlens[4]] = -100
        targets[cu_seqlens[7]] = 1
        for values in (logp, old_logp, ref_logp):
            values[targets < 0] = math.nan
    return between(targets, 5), *(between(values, 3.0) for values in (logp, old_logp, ref_logp)), cu_seqlens


@pytest.mark.parametrize("valid", [[], [0] * 5, [1], [1, 0, 0], [0, 1] * 9 + [1], [1] * 16])
def test_terms_add_up_to_loss_and_statistics(valid):
    torch.manual_seed(0)
    N, tokens = len(valid), sum(valid)
    memory = torch.full((N + 20, 8), 9.0)  # what lies behind the terms must not count
    terms = memory[:N]
    terms.copy_(torch.randn(N, 8))
    terms[:, 5] = torch.rand(N) + torch.tensor([0.2, 1.5]).repeat(N)[:N]
    terms[:, 7] = 1
    terms *= torch.tensor(valid, dtype=torch.float32)[:, None]
    loss, stats = finish(terms)
    assert loss.shape == () and stats.shape == (10,)
    total = terms.double().sum(0)
    ratios = terms[terms[:, 7] > 0, 5].double()
    torch.testing.assert_close(loss.double(), total[6], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(stats[:6].double(), total[:6] / max(tokens, 1), atol=2e-6, rtol=1e-6)
    want = [ratios.min().item(), ratios.max().item()] if tokens else [1, 1]
    assert stats[6:].tolist() == [*want, tokens, N - tokens]


def test_the_order_of_sums_does_not_change():
    terms = torch.randn(100, 8)
    terms[:, 7] = 1
    first, second = finish(terms), finish(terms.clone())
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def mean(values):
    return sum(values) / max(len(values), 1)


def divergence(logp, ref, kind):
    d = ref - logp
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kind]


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sequence_knows_its_ratio_and_divergence(masked, kl):
    targets, logp, old_logp, ref_logp, cu_seqlens = made_up(LENGTHS, masked=masked)
    options = GrpoOptions(loss_type="grpo", ratio_level="sequence", kl=kl)
    got = sequence_sums(Scored(targets if masked else None, old_logp, ref_logp), cu_seqlens, 70, options, None, logp)
    assert got.of_token.dtype == torch.int32
    assert got.of_token.tolist() == [s for s, length in enumerate(LENGTHS) for _ in range(length)]
    count, log_ratio, mean_kl = [], [], []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        tokens = [i for i in range(start, end) if not masked or targets[i] >= 0]
        count.append(len(tokens))
        log_ratio.append(mean([(logp[i] - old_logp[i]).item() for i in tokens]))
        mean_kl.append(mean([divergence(logp[i].item(), ref_logp[i].item(), kl) for i in tokens]))
    torch.testing.assert_close(got.log_ratio, torch.tensor(log_ratio), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(got.mean_kl, torch.tensor(mean_kl), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(got.weight, torch.tensor([1 / (11 * max(n, 1)) for n in count]))
    assert got.tokens.tolist() == [sum(count)] and 0 in count and 1 in count


def test_without_old_or_reference_policy_ratio_and_divergence_are_0():
    targets, logp, old_logp, ref_logp, cu_seqlens = made_up(LENGTHS)
    options = GrpoOptions(ratio_level="sequence")
    for old, ref in ((None, ref_logp), (old_logp, None), (None, None)):
        got = sequence_sums(Scored(targets, old, ref), cu_seqlens, 70, options, None, logp)
        assert (got.log_ratio == 0).all() == (old is None) and (got.mean_kl == 0).all() == (ref is None)
        assert got.log_ratio.shape == got.mean_kl.shape == (11,)
        assert got.log_ratio.isfinite().all() and got.mean_kl.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "dr_grpo", "bnpo", "dapo", "cispo"])
@pytest.mark.parametrize("total", [None, 1, 200, "tensor"])
def test_a_token_weighs_what_its_loss_type_says(total, loss_type, masked):
    targets, *_, cu_seqlens = made_up(LENGTHS, masked=masked)
    options = GrpoOptions(loss_type=loss_type, max_completion_length=9)
    given = torch.tensor(70) if total == "tensor" else total
    got = sequence_sums(Scored(targets if masked else None, None, None), cu_seqlens, 70, options, given, None)
    cuts = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    count = [(targets[start:end] >= 0).sum().item() for start, end in cuts]
    whole = sum(count) if loss_type == "bnpo" or given is None else int(given)
    share = {"grpo": [1 / 11 / max(n, 1) for n in count], "dr_grpo": [1 / 11 / 9] * 11}
    want = share.get("grpo" if loss_type == "sapo" else loss_type, [1 / whole] * 11)
    torch.testing.assert_close(got.weight, torch.tensor(want))
    assert got.tokens.tolist() == [sum(count)]
    assert got.log_ratio.shape == got.mean_kl.shape == (0,)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize(("targets", "weight"), [([-1, -1], 1.0), ([-1, 0], 1.0), ([2, 0], 0.5)])
def test_few_tokens(targets, weight, loss_type):
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    scored = Scored(torch.tensor(targets), None, None)
    got = sequence_sums(scored, cu_seqlens, 2, GrpoOptions(loss_type=loss_type), None, None)
    assert got.weight.tolist() == [weight] and got.tokens.tolist() == [sum(t >= 0 for t in targets)]


def test_no_sequences():
    for loss_type in ("grpo", "dr_grpo", "dapo"):
        options = GrpoOptions(loss_type=loss_type, max_completion_length=9)
        got = sequence_sums(Scored(None, None, None), torch.zeros(1, dtype=torch.int32), 0, options, None, None)
        assert got.weight.shape == got.of_token.shape == (0,) and got.tokens.tolist() == [0]
