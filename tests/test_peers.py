"""Our losses equal TRL 1.16's and Liger 0.8.5's where they define the same one.

Both are optional: pip install trl==1.16.0 liger-kernel==0.8.5 beside this package.
"""

import types
from collections import defaultdict

import pytest
import torch
from grpo_cases import cast, per_token
from torch.nn.utils.rnn import pad_sequence

from medground_kernels.grpo_loss import GrpoOptions, grpo_loss

LENGTHS = [5, 1, 9, 3]
CHOICES = [
    GrpoOptions(loss_type="grpo"),
    GrpoOptions(loss_type="grpo", beta=0.2, epsilon_high=0.4),
    GrpoOptions(loss_type="bnpo", beta=0.2),
    GrpoOptions(loss_type="dr_grpo", max_completion_length=11, delta=1.5),
    GrpoOptions(loss_type="dapo", beta=0.1, delta=0.95),
    GrpoOptions(loss_type="dapo", beta=0.1, kl_ratio=True),
    GrpoOptions(loss_type="cispo", epsilon_high=1.1, beta=0.1),
    GrpoOptions(loss_type="sapo", beta=0.1, sapo_temperature_pos=0.8),
    GrpoOptions(loss_type="grpo", ratio_level="sequence", beta=0.1, epsilon_low=3e-3, epsilon_high=4e-3),
    GrpoOptions(loss_type="dapo", ratio_level="sequence", beta=0.1, kl_ratio=True),
]


def case(masked):
    torch.manual_seed(0)
    return cast(per_token(LENGTHS, masked=masked), torch.float64)


def padded(values):
    return pad_sequence(list(values.split(LENGTHS)), batch_first=True)


def ours(given, options, total_tokens):
    leaf = given["logp"].float().requires_grad_()
    rest = {name: t for name, t in given.items() if name != "logp"}
    out = grpo_loss(leaf, **rest, options=options, total_tokens=total_tokens)
    out.loss.backward()
    return out.loss.detach().double(), leaf.grad.double()


def mask_of(given):
    valid = torch.ones(sum(LENGTHS)) if given["targets"] is None else (given["targets"] >= 0).double()
    return padded(valid)


def trl(given, options, total_tokens):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed").GRPOTrainer
    pytest.importorskip("trl").__version__ == "1.16.0" or pytest.skip("not TRL 1.16.0")
    logp = padded(given["logp"]).requires_grad_()
    entropy = padded(given["entropy"])
    config = types.SimpleNamespace(
        delta=options.delta,
        use_bias_correction_kl=options.kl_ratio,
        sapo_temperature_pos=options.sapo_temperature_pos,
        sapo_temperature_neg=options.sapo_temperature_neg,
        steps_per_generation=1,
    )
    accelerator = types.SimpleNamespace(
        num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t, sync_gradients=False
    )
    fake = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options.ratio_level,
        beta=options.beta,
        args=config,
        loss_type=options.loss_type,
        epsilon_low=options.epsilon_low,
        epsilon_high=options.epsilon_high,
        use_vllm=False,
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=options.max_completion_length,
        accelerator=accelerator,
        _entropy_bonus_enabled=options.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=options.entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    mask = mask_of(given)
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1),
        "prompt_mask": torch.zeros(len(LENGTHS), 1),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": given["advantages"],
        "old_per_token_logps": padded(given["old_logp"]),
        "ref_per_token_logps": padded(given["ref_logp"]),
        "num_items_in_batch": torch.tensor(float(total_tokens or mask.sum())),
    }
    loss = trainer._compute_loss(fake, fake.model, inputs)
    loss.backward()
    return loss.detach(), torch.cat([row[:n] for row, n in zip(logp.grad, LENGTHS, strict=True)])


def liger(given, options, total_tokens):
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="Liger is not installed")
    logp, mask = padded(given["logp"]).requires_grad_(), mask_of(given)
    loss, _ = module.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        per_token_logps=logp,
        attention_mask=mask,
        advantages=given["advantages"],
        full_attention_mask=mask,
        ref_per_token_logps=padded(given["ref_logp"]),
        old_per_token_logps=padded(given["old_logp"]),
        epsilon_low=options.epsilon_low,
        epsilon_high=options.epsilon_high,
        beta=options.beta,
        loss_type=options.loss_type,
        max_completion_length=options.max_completion_length,
        importance_sampling_level=options.ratio_level,
        sapo_temperature_pos=options.sapo_temperature_pos,
        sapo_temperature_neg=options.sapo_temperature_neg,
        delta=options.delta,
        use_bias_correction_kl=options.kl_ratio,
        num_items_in_batch=total_tokens,
    )
    loss.backward()
    return loss.detach(), torch.cat([row[:n] for row, n in zip(logp.grad, LENGTHS, strict=True)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", CHOICES, ids=lambda o: f"{o.loss_type}-{o.ratio_level}")
@pytest.mark.parametrize("peer", [trl, liger])
def test_the_same_loss(peer, options, masked):
    given = case(masked)
    for total_tokens in (None, 50):
        loss, grad = ours(given, options, total_tokens)
        theirs, their_grad = peer(given, options, total_tokens)
        torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, their_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_same_entropy_bonus(loss_type):
    given, options = case(masked=True), GrpoOptions(loss_type=loss_type, entropy_coef=0.3)
    torch.testing.assert_close(ours(given, options, 50)[0], trl(given, options, 50)[0], rtol=1e-5, atol=1e-6)
