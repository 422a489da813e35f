"""Operations against torch's own counter, pairs counted one by one, and what the numbers must do."""

from types import SimpleNamespace

import pytest
import torch
from stream_cases import made_group, made_prompt, policy_of, small_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.vision_utils import get_vision_window_index

from medground.config import LoraConfig
from medground.costs import (
    Network,
    Sizes,
    network_of,
    peak_of,
    peak_rate,
    row_operations,
    sizes_of,
    step_operations,
)
from medground.packing import pack
from medground_kernels.grpo_options import GrpoOptions

NOTHING = Network(0, 0, 0, 0, 0, 0, 0.0, 0, 0, window=4, merge=2, vision_trained=True)
GROUP = made_group(made_prompt("a", [3, 5], [(6, 3)]), [4, 1, 9])
CPU = torch.device("cpu")


def counted(call) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op).removeprefix("aten."): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def linear_only(network: Network) -> Network:
    return network._replace(pair_width=0, pair_update=0, full_width=0, window_width=0)


def products(call) -> int:
    """As torch counts them; attention is left out, whose padded form on a CPU does more than is needed."""
    found = counted(call)
    return sum(found.get(op, 0) for op in ("mm", "addmm", "convolution", "convolution_backward"))


def test_products_are_those_that_torch_counts():
    policy = policy_of(small_model())
    packed = pack([GROUP], policy.vlm.config, CPU)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    options = GrpoOptions(loss_type="dapo", beta=0.0)

    def update():
        policy.loss(packed, advantages, old_logp=None, ref_logp=None, options=options, total_tokens=14).loss.backward()

    network = network_of(policy)
    found = step_operations(linear_only(network), sizes_of([GROUP]), scorings=1)
    with torch.no_grad():
        assert products(lambda: policy(packed, 1.0)) == found["score"]
    pixels = 2 * policy.vlm.model.visual.patch_embed.proj.weight.numel() * len(GROUP.prompt.pixel_values)
    unseen = 2 * network.head_weights * 14  # torch does not count a product that is added in place, the head's gradient
    assert products(update) == found["update"] - unseen - pixels  # which need no gradient
    policy.vlm.model.visual.requires_grad_(False)
    frozen = step_operations(linear_only(network_of(policy)), sizes_of([GROUP]))
    assert products(update) == frozen["update"] - unseen


@pytest.mark.parametrize("targets", ["all", "attention", "mlp"])
def test_frozen_weights_have_no_gradient_of_their_own(targets: str):
    pytest.importorskip("peft")
    policy = policy_of(small_model())
    plain = network_of(policy)
    policy.add_adapters(LoraConfig(rank=4, targets=targets), seed=0)
    packed = pack([GROUP], policy.vlm.config, CPU)
    advantages, options = torch.tensor([1.0, -1.0, 0.5]), GrpoOptions(loss_type="dapo", beta=0.0)

    def update():
        policy.loss(packed, advantages, old_logp=None, ref_logp=None, options=options, total_tokens=14).loss.backward()

    network = network_of(policy)
    found = step_operations(linear_only(network), sizes_of([GROUP]), scorings=1)
    with torch.no_grad():
        assert products(lambda: policy(packed, 1.0, adapters=False)) == found["score"]
    assert products(update) == found["update"]
    assert policy.vlm.lm_head.weight.grad is None  # whose product torch would not count
    assert network.head_update == 2 * network.head_weights
    assert network.token_weights == plain.token_weights and not network.vision_trained
    layers = policy.vlm.config.text_config.num_hidden_layers
    assert network.pair_update == plain.pair_update - (2 * plain.pair_width // layers if targets == "mlp" else 0)


def test_a_roll_out_runs_every_token_but_the_last_ones():
    network = network_of(policy_of(small_model()))
    (size,) = sizes_of([GROUP])
    found = step_operations(network, [size], scorings=1)
    P, C = len(GROUP.prompt.input_ids), sum(size.completions)
    tokens = linear_only(network)._replace(patch_weights=0, head_weights=0)
    alone = step_operations(tokens, [size], scorings=1)
    assert alone["prefill"] == 2 * network.token_weights * P
    assert alone["decode"] == 2 * network.token_weights * (C - 3)
    heads = NOTHING._replace(head_weights=10, head_update=30)
    assert step_operations(heads, [size], scorings=2) == {
        "prefill": 20, "decode": 20 * (C - 3), "score": 2 * 20 * C, "update": 3 * 20 * C
    }  # fmt: skip
    assert found["prefill"] + found["decode"] < found["score"]


@pytest.mark.parametrize("prompt, completions", [(7, [3, 1, 4]), (1, [1]), (5, [])])
def test_pairs_that_see_each_other(prompt: int, completions: list[int]):
    owner = torch.tensor([0] * prompt + [i + 1 for i, c in enumerate(completions) for _ in range(c)])
    at = torch.arange(len(owner))
    sees = (at[:, None] >= at) & ((owner == 0) | (owner[:, None] == owner))
    network = NOTHING._replace(pair_width=5)
    assert step_operations(network, [Sizes(prompt, [], completions)], scorings=1)["score"] == 4 * 5 * sees.sum().item()


@pytest.mark.parametrize("grid", [(1, 16, 16), (1, 18, 10), (1, 4, 30), (2, 12, 6)])
def test_pairs_of_patches(grid: tuple[int, int, int]):
    frames, height, width = grid
    _, cu = get_vision_window_index(torch.tensor([grid]), 2, 112, 14)
    in_windows = torch.as_tensor(cu).diff().double().square().sum().item()
    image = [Sizes(0, [grid], [])]
    assert step_operations(NOTHING._replace(window_width=1), image)["prefill"] == 4 * in_windows
    assert step_operations(NOTHING._replace(full_width=1), image)["prefill"] == 4 * frames * (height * width) ** 2
    assert step_operations(NOTHING._replace(patch_weights=2.5), image)["prefill"] == 5 * frames * height * width


def test_rows_cost_what_groups_of_one_do():
    network = network_of(policy_of(small_model()))
    (size,) = sizes_of([GROUP])
    alone = [step_operations(network, [Sizes(size.prompt, size.grids, [c])])["update"] for c in size.completions]
    assert row_operations(network, [size]) == sum(alone) > step_operations(network, [size])["update"]
    twice = step_operations(network, [size], epochs=2)
    assert twice["update"] == 2 * step_operations(network, [size])["update"] and twice["score"] == 0


@pytest.mark.parametrize(
    "name, rate",
    {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA RTX A4000": None,
        "NVIDIA GB200": None,
    }.items(),
)
def test_peaks(name: str, rate: float | None):
    assert peak_rate(name) == rate


def test_a_peak_is_of_all_gpus_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpus, cpus = (SimpleNamespace(device=torch.device(kind), size=4) for kind in ("cuda", "cpu"))
    assert peak_of(gpus, torch.bfloat16) == 4 * 989e12
    assert peak_of(gpus, torch.float32) is None and peak_of(cpus, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    assert peak_of(gpus, torch.bfloat16) is None
