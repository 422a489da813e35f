"""Adapters: against peft's own model on padded rows, off, merged, drawn; what they leave alone."""

import copy
import sys

import pytest
import torch
from stream_cases import IMAGE, made_group, made_prompt, policy_of, small_model

from bench.unpacked import pad_rows, unpacked_logp
from medground.activation_checkpointing import checkpoint_activations
from medground.config import LoraConfig
from medground.lora import merged, need_peft
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
PLAIN = policy_of(VLM).to(DEVICE)
LORA = LoraConfig(rank=4, alpha=12)


def adapted(lora: LoraConfig = LORA) -> Policy:
    """With adapters that are more than zeros."""
    policy = policy_of(VLM).to(DEVICE)
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


@pytest.mark.parametrize(
    ("targets", "how"),
    [
        ("all", "plain"),
        ("attention", "plain"),
        ("mlp", "checkpointed"),
        pytest.param("all", "compiled and checkpointed", marks=pytest.mark.slow),
    ],
)
def test_the_stream_equals_padded_rows_of_peft(targets: str, how: str):
    policy = adapted(LoraConfig(rank=4, alpha=12, targets=targets))
    theirs = peft_model(policy)
    want = unpacked_logp(theirs.base_model.model, pad_rows(GROUPS, IMAGE, DEVICE), 0.7)
    want_grads = gradients(theirs, want)
    if how != "plain":
        checkpoint_activations(policy.vlm, "full")
    if "compiled" in how:
        torch.compiler.reset()
        policy.compile_layers(backend="eager")  # what it traces is in question, not what the compiler makes of it
    logp = policy.train()(PACKED, 0.7).logp
    torch.testing.assert_close(logp, want, atol=5e-6, rtol=0)
    ours = gradients(policy.vlm, logp)
    assert ours.keys() == want_grads.keys()
    total = torch.cat([grad.flatten() for grad in want_grads.values()]).norm()
    for name, grad in want_grads.items():
        assert grad.norm() > 0, name
        assert (ours[name] - grad).norm() <= 5e-6 * max(grad.norm(), 1e-2 * total), name


def test_new_adapters_change_nothing_and_are_drawn_from_the_seed():
    first, again, other = (policy_of(VLM).to(DEVICE) for _ in range(3))
    for policy, seed in ((first, 1), (again, 1), (other, 2)):
        torch.manual_seed(17 + seed)
        policy.add_adapters(LORA, seed)
    assert torch.equal(first(PACKED, 1.0).logp, PLAIN(PACKED, 1.0).logp)
    draws = [{n: p for n, p in policy.named_parameters() if p.requires_grad} for policy in (first, again, other)]
    assert len(draws[0]) == 2 * 3 * 7 and all(".lora_" in name for name in draws[0])
    for name, weight in draws[0].items():
        assert torch.equal(weight, draws[1][name])
        bound = weight.shape[1] ** -0.5
        if "lora_A" in name:
            assert not torch.equal(weight, draws[2][name]) and 0.8 * bound < weight.abs().max() <= bound
        else:
            assert not weight.any()


def test_the_reference_is_the_model_without_its_adapters():
    policy, before = adapted(), PLAIN(PACKED, 0.7)
    with torch.no_grad():
        on, off, again = (policy(PACKED, 0.7, adapters=adapters) for adapters in (True, False, True))
    assert torch.equal(off.logp, before.logp) and torch.equal(off.entropy, before.entropy)
    assert torch.equal(on.logp, again.logp) and (on.logp - off.logp).abs().max() > 0.1
    assert len(gradients(policy.vlm, policy(PACKED, 0.7).logp)) == 2 * 3 * 7


def test_adapters_come_back_after_an_error():
    policy = adapted()
    with torch.no_grad():
        want = policy(PACKED, 1.0).logp
        with pytest.raises(ValueError, match="temperature"):
            policy(PACKED, -1.0, adapters=False)
        assert torch.equal(policy(PACKED, 1.0).logp, want)


@pytest.mark.parametrize("targets", ["all", "mlp"])
def test_merged_as_peft_merges(targets: str):
    policy = adapted(LoraConfig(rank=4, alpha=12, targets=targets))
    before = {name: weight.clone() for name, weight in policy.vlm.named_parameters()}
    ours = dict(merged(dict(policy.vlm.named_parameters()), policy.lora))
    theirs = dict(peft_model(policy).merge_and_unload().named_parameters())
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, atol=1e-6, rtol=0, msg=name)
    changed = {name for name, weight in VLM.named_parameters() if not torch.equal(ours[name], weight)}
    assert changed == {f"model.language_model.layers.{i}.{n}.weight" for i in range(3) for n in NAMES[targets]}
    assert all(torch.equal(weight, before[name]) for name, weight in policy.vlm.named_parameters())


def test_half_weights_are_merged_in_float32():
    policy = policy_of(VLM).to(DEVICE, torch.bfloat16)
    policy.add_adapters(LORA, seed=3)
    weights = dict(policy.vlm.named_parameters())
    assert {w.dtype for n, w in weights.items() if ".lora_" in n} == {torch.float32}
    name = "model.language_model.layers.1.mlp.up_proj"
    with torch.no_grad():
        weights[f"{name}.lora_B.default.weight"].normal_()
    base, A, B = (weights[f"{name}.{w}.weight"] for w in ("base_layer", "lora_A.default", "lora_B.default"))
    assert base.dtype == torch.bfloat16
    found = dict(merged(weights, policy.lora))[f"{name}.weight"]
    torch.testing.assert_close(found, base.float() + 3.0 * (B @ A), atol=1e-6, rtol=0)


def test_weights_without_adapters_pass_through():
    weights = dict(VLM.named_parameters())
    assert all(found is weights[name] for name, found in merged(weights, LoraConfig()))


def test_a_missing_peft_is_named(monkeypatch):
    need_peft()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"adapters want peft: pip install medground\[lora\]; got .*peft"):
        need_peft()
