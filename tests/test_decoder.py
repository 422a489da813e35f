"""A decoding step against transformers' layers over the whole sequence, and whose weights it uses."""

import pytest
import torch
from stream_cases import V, policy_of, small_model
from torch import Tensor
from torch.nn import functional as F

from medground.policy import Policy
from medground.rollout.decoder import Decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VLM = small_model(seed=3).to(DEVICE)
TOKENS = torch.randint(0, 140, (3, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def a_policy(**text: object) -> Policy:
    vlm = small_model(seed=3, **text) if text else VLM
    return policy_of(vlm).to(DEVICE).requires_grad_(False)


@torch.no_grad()
def decoded(decoder: Decoder) -> Tensor:
    """Logits [3, 9, V], a token of each row at a time, over plainly kept keys and values."""
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kept.setdefault(layer, []).append((k, v))
        keys, values = (torch.stack(part, 2) for part in zip(*kept[layer], strict=True))  # [R, Hkv, L, D]
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, scale=scale, enable_gqa=True)[:, :, 0]

    positions = torch.arange(TOKENS.shape[1], device=DEVICE).expand_as(TOKENS)
    steps = zip(TOKENS.T, positions.T, strict=True)
    return torch.stack([decoder(tokens, at, attend) for tokens, at in steps], 1)


@torch.no_grad()
def whole(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("compile_with", [None, "aot_eager"])
def test_steps_equal_the_whole_sequence(compile_with):
    logits = decoded(Decoder(a_policy(), compile_with))
    assert logits.shape == (*TOKENS.shape, V)
    torch.testing.assert_close(logits, whole(VLM), atol=2e-5, rtol=1e-5)


def test_as_many_key_heads_as_query_heads():
    vlm = small_model(seed=3, num_key_value_heads=4).to(DEVICE)
    logits = decoded(Decoder(policy_of(vlm).to(DEVICE).requires_grad_(False)))
    torch.testing.assert_close(logits, whole(vlm), atol=2e-5, rtol=1e-5)


def test_the_weights_stay_the_policys_own():
    policy = a_policy()
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    decoder = Decoder(policy)
    after = policy.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) and after[name].is_contiguous() for name, weight in before.items())
    other = small_model(seed=4).to(DEVICE)
    policy.vlm.load_state_dict(other.state_dict())  # copies in place
    torch.testing.assert_close(decoded(decoder), whole(other), atol=2e-5, rtol=1e-5)


def test_joining_twice_does_no_harm():
    policy = a_policy()
    Decoder(policy)
    torch.testing.assert_close(decoded(Decoder(policy)), whole(VLM), atol=2e-5, rtol=1e-5)


def test_half_precision_is_as_near_as_transformers_own():
    truth, half = whole(VLM), a_policy()
    half.vlm.to(torch.bfloat16)
    ours = decoded(Decoder(half)).float() - truth
    theirs = whole(small_model(seed=3).to(DEVICE, torch.bfloat16)).float() - truth
    assert ours.square().mean() <= 1.5 * theirs.square().mean()


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="want hidden_act silu; got 'gelu'"):
        Decoder(a_policy(hidden_act="gelu"))
