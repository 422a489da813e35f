"""Adapters: against peft's own model on padded rows, off, merged, drawn; what they leave alone."""

import copy
import sys

import pytest
import torch
from stream_cases import IMAGE, made_group, made_prompt, policy_of, small_model

from bench.unpacked import pad_rows, unpacked_logp
from medground.config import LoraConfig
from medground.lora import add_adapters, draw_adapters, merged, need_peft
from medground.packing import pack
from medground.policy import Policy

peft = pytest.importorskip("peft")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VLM = small_model().to(DEVICE)
GROUPS = [
    made_group(made_prompt("a", [4, 6], [(3, 4)]), [3, 1, 9], seed=1),
    made_group(made_prompt("b", [5]), [4, 7], seed=2),
]
PACKED = pack(GROUPS, VLM.config, DEVICE)
LORA = LoraConfig(rank=4, alpha=12)


def adapted(lora: LoraConfig = LORA, vlm=VLM) -> Policy:
    """With adapters that are more than zeros."""
    policy = policy_of(vlm).to(DEVICE)
    policy.add_adapters(lora, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return policy


NAMES = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
NAMES["all"] = NAMES["attention"] + NAMES["mlp"]


def peft_model(policy: Policy):
    """The same model and adapters by peft alone, each target by its full name."""
    targets = [f"model.language_model.layers.{i}.{name}" for i in range(3) for name in NAMES[policy.lora.targets]]
    config = peft.LoraConfig(r=policy.lora.rank, lora_alpha=policy.lora.alpha, target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(VLM), config)
    model.base_model.model.load_state_dict(policy.vlm.state_dict())
    return model


def gradients(model: torch.nn.Module, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logp * torch.linspace(-1, 1, len(logp), device=DEVICE)).sum().backward()
    return {name.removeprefix("base_model.model."): p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["plain", "checkpointed", "compiled and checkpointed"])
@pytest.mark.parametrize("targets", ["all", "attention", "mlp"])
def test_the_stream_equals_padded_rows_of_peft(targets: str, how: str):
    policy = adapted(LoraConfig(rank=4, alpha=12, targets=targets))
    theirs = peft_model(policy)
    want = unpacked_logp(theirs.base_model.model, pad_rows(GROUPS, IMAGE, DEVICE), 0.7)
    want_grads = gradients(theirs, want)
    if how != "plain":
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    if "compiled" in how:
        torch.compiler.reset()
        policy.compile_layers(backend="aot_eager")
    logp = policy.train()(PACKED, 0.7).logp
    torch.testing.assert_close(logp, want, atol=5e-6, rtol=0)
    ours = gradients(policy.vlm, logp)
    assert ours.keys() == want_grads.keys()
    total = torch.cat([grad.flatten() for grad in want_grads.values()]).norm()
    for name, grad in want_grads.items():
        assert grad.norm() > 0, name
        assert (ours[name] - grad).norm() <= 5e-6 * max(grad.norm(), 1e-2 * total), name
