"""Log-probabilities and entropies against float64, values and gradients."""

import pytest
import torch

from medground_kernels.linear_logprob import linear_logprob
from medground_kernels.token_logprob import token_logprob

pytestmark = pytest.mark.usefixtures("on_the_gpu")


def truth(logits, targets, temperature):
    logp = (logits.double() / temperature).log_softmax(-1)
    picked = logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return picked.masked_fill(targets < 0, 0), entropy.masked_fill(targets < 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (7, 1000), (4, 9001), (0, 5)])
def test_as_close_to_the_truth_as_float32_allows(rows, vocab, dtype):
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab).to(dtype)
    logits[:, -1] += 10
    targets = torch.randint(vocab, (rows,))
    targets[::3] = -1
    upstream = torch.linspace(-1, 1, rows)
    results = []
    for fn, leaf in ((truth, logits.double()), (token_logprob, logits)):
        leaf = leaf.detach().clone().requires_grad_()
        logp, entropy = fn(leaf, targets, temperature=0.7)
        (logp * upstream.to(logp.dtype) + entropy * upstream.flip(0).to(logp.dtype)).sum().backward()
        results.append((logp.detach(), entropy.detach(), leaf.grad))
    (t_logp, t_entropy, t_grad), (logp, entropy, grad) = results
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), t_logp, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), t_entropy, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(grad.double(), t_grad, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_masked_tokens_carry_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    out = token_logprob(logits, torch.tensor([-1, 2, -1]))
    (out.logp.sum() + out.entropy.sum()).backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).tolist() == [False, True, False]


def test_linear_form_equals_logits():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,))
    ours = linear_logprob(hidden, weight, targets, temperature=1.3)
    theirs = token_logprob(hidden @ weight.T, targets, temperature=1.3)
    torch.testing.assert_close(ours, theirs)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"\(2, 8\), \(3,\)"):
        token_logprob(torch.zeros(2, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="int32"):
        token_logprob(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="temperature"):
        token_logprob(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), temperature=0.0)
    with pytest.raises(ValueError, match=r"\(2, 8\), \(5, 7\)"):
        linear_logprob(torch.zeros(2, 8), torch.zeros(5, 7), torch.zeros(2, dtype=torch.int64))
