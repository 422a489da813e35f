"""sample_token: one decoding step of R rows, plain and with top-k and top-p."""

import pytest
import torch

from bench import peers_logits as peers
from bench.race import Contender, Errors, copy_floor, relative_error
from bench.timing import synced_clock
from bench.workloads import CUDA, make_logits
from medground_kernels.sample_token import sample_token, sample_token_reference

pytestmark = pytest.mark.benchmark(timer=synced_clock)

R = 64 if CUDA else 8
V = 151_936 if CUDA else 32_000
DTYPE = torch.bfloat16 if CUDA else torch.float32


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (50, 0.95)])
def test_one_step(race, top_k, top_p):
    logits, _ = make_logits(R, V, DTYPE)
    logits = logits.detach()
    seeds = torch.arange(R, device=logits.device)
    how = {"temperature": 0.7, "top_k": top_k, "top_p": top_p}

    def ours():
        sampled = sample_token(logits, **how, seeds=seeds, step=3)
        return {"drawn": sampled.token, "logp": sampled.logp, "full": sampled.full_logp}

    wide = logits.double()
    truth = peers.filtered(wide, **how)
    full = (wide / how["temperature"]).log_softmax(-1)
    # the reference of top-k and top-p compares every two tokens; what they leave is known here
    left = wide.masked_fill(truth == -torch.inf, -torch.inf)
    drawn = sample_token_reference(left, temperature=how["temperature"], seeds=seeds, step=3).token

    def judge(result):
        """A token's log-probability is that of the distribution it was drawn from; ours must draw as its reference."""
        token = result.get("drawn", result.get("token"))[:, None]
        errors = [relative_error(result["logp"], truth.gather(-1, token)[:, 0])]
        if "drawn" in result:
            errors.append((result["drawn"] != drawn).double().mean().item())
            errors.append(relative_error(result["full"], full.gather(-1, token)[:, 0]))
        return Errors(max(errors, key=lambda error: (error != error, error)), float("nan"))

    contenders = {
        "ours": Contender(lambda: ours),
        "torch": peers.torch_sample(logits, **how),
    }
    if not top_k:
        contenders["torch.compile"] = peers.exponential_sample(logits, how["temperature"])
    op = "sample_token" + (f", top-k {top_k}, top-p {top_p}" if top_k else "")
    workload = f"R {R} V {V} {str(DTYPE).removeprefix('torch.')}"
    race(op, workload, contenders, judge, dtype=torch.float32, floor=copy_floor(logits.nbytes))
