"""Ranks: mistakes are everyone's, weights come back sharded."""

from pathlib import Path

import pytest
import torch
from stream_cases import made_group, made_prompt, policy_of, small_model
from torch.distributed.tensor import DTensor

from medground.config import LoraConfig
from medground.packing import pack
from medground.policy import empty_policy, load_policy
from medground.sharding import Ranks, WholeCopy, join_ranks, reduce_gradients, shard


def test_a_mistake_on_one_rank_is_raised():
    def fail():
        raise ValueError("the file is missing")

    with join_ranks() as ranks:
        assert ranks.together(lambda: 7) == 7
        with pytest.raises(ValueError, match="the file is missing"):
            ranks.together(fail)
        assert ranks.gather("x") == ["x"] and ranks.is_first


def test_the_whole_copy_follows_the_sharded_weights(base_folder: Path):
    with join_ranks() as ranks:
        policy = shard(load_policy(base_folder), ranks, "float32")
        whole = WholeCopy(policy, ranks, "float32")
        places = [p.data_ptr() for p in whole.policy.parameters()]
        for step in range(2):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(step * 0.1)
            copy = whole.refresh()
            ours = dict(copy.named_parameters())
            for name, parameter in policy.named_parameters():
                assert isinstance(parameter, DTensor)
                assert torch.equal(ours[name], parameter.full_tensor()), name
        assert [p.data_ptr() for p in copy.parameters()] == places
        assert not any(p.requires_grad for p in copy.parameters()) and not copy.training
        for name, buffer in policy.named_buffers():
            assert torch.equal(copy.get_buffer(name), buffer)


def test_half_precision_computes_in_half(base_folder: Path):
    with join_ranks() as ranks:
        policy = shard(load_policy(base_folder), ranks, "bfloat16")
        assert all(p.dtype == torch.float32 for p in policy.parameters())
        copy = WholeCopy(policy, ranks, "bfloat16").refresh()
        head = policy.vlm.lm_head.weight.full_tensor()
        assert copy.vlm.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(copy.vlm.lm_head.weight, head.bfloat16())
        assert all(b.dtype == torch.float32 for b in copy.buffers()), "rotary frequencies lose their meaning in half"


def test_tied_weights_stay_tied(base_folder: Path):
    policy = load_policy(base_folder)
    policy.vlm.config.tie_word_embeddings = policy.vlm.config.text_config.tie_word_embeddings = True
    policy.vlm.tie_weights()
    with join_ranks() as ranks:
        copy = WholeCopy(shard(policy, ranks, "float32"), ranks, "float32").refresh()
        assert copy.vlm.lm_head.weight is copy.vlm.model.language_model.embed_tokens.weight
        assert torch.equal(copy.vlm.lm_head.weight, policy.vlm.lm_head.weight.full_tensor())


def test_adapters_are_merged_into_what_decodes(base_folder: Path):
    pytest.importorskip("peft")
    with join_ranks() as ranks:
        policy = load_policy(base_folder, torch.bfloat16)
        policy.add_adapters(LoraConfig(rank=4, alpha=8), seed=0)
        before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
        policy = shard(policy, ranks, "bfloat16")
        assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert {buffer.dtype for buffer in policy.buffers()} == {torch.float32}
        whole = WholeCopy(policy, ranks, "bfloat16")
        assert own(whole.policy.vlm.lm_head.weight, policy.vlm.lm_head.weight)
        for step in range(2):
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(0.01 * (step + 1))
            copy = whole.refresh()
            weights = {name: parameter.full_tensor() for name, parameter in policy.named_parameters()}
            stem = "vlm.model.language_model.layers.0.mlp.up_proj"
            A, B = (weights[f"{stem}.lora_{which}.default.weight"].bfloat16().float() for which in "AB")
            want = (before[f"{stem}.base_layer.weight"].float() + 2.0 * (B @ A)).bfloat16()
            torch.testing.assert_close(copy.get_parameter(f"{stem}.weight"), want, atol=0, rtol=2**-7)
            assert not torch.equal(want, before[f"{stem}.base_layer.weight"])
            assert all(torch.equal(w, before[name]) for name, w in weights.items() if ".lora_" not in name)


def own(ours: torch.Tensor, sharded: torch.Tensor) -> bool:
    """Whether a whole weight is the memory of the only shard."""
    return ours.data_ptr() == sharded.to_local().data_ptr()


def test_frozen_weights_are_shared_or_copied_once(base_folder: Path):
    name = "vlm.model.visual.blocks.0.mlp.up_proj.weight"
    with join_ranks() as ranks:
        for precision, shared in (("float32", True), ("bfloat16", False)):  # a copy in half is another memory
            policy = load_policy(base_folder)
            policy.vlm.model.visual.requires_grad_(False)
            policy = shard(policy, ranks, precision)
            whole = WholeCopy(policy, ranks, precision)
            trained = "vlm.model.language_model.layers.0.mlp.up_proj.weight"
            assert not own(whole.refresh().get_parameter(trained), policy.get_parameter(trained))
            frozen = whole.policy.get_parameter(name)
            assert own(frozen, policy.get_parameter(name)) == shared
            assert torch.equal(frozen, policy.get_parameter(name).full_tensor().to(frozen.dtype))
            frozen.zero_()
            assert not whole.refresh().get_parameter(name).any()
            # what is shared is not freed with the copy, nor filled in by it
            assert policy.get_parameter(name).full_tensor().any() != shared


@pytest.mark.parametrize(
    ("asked", "local", "want"),
    [(0, None, 1), (0, 8, 3), (1, 8, 1), (4, 8, 4), (24, 8, 24), (0, 24, 1), (12, None, 12)],
)
def test_replicas_are_nodes_unless_said(asked: int, local: int | None, want: int, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert Ranks(0, 24, torch.device("cpu"), None).replicas(asked) == want


@pytest.mark.parametrize(
    ("asked", "local", "message"),
    [
        (5, 8, "sharding.replicas: want a divisor of the 24 ranks; got 5"),
        (48, 8, "sharding.replicas: want a divisor of the 24 ranks; got 48"),
        (0, 7, "sharding.replicas: want nodes of equally many ranks for 0; got 24 ranks, 7 on a node"),
    ],
)
def test_replicas_that_ranks_cannot_have(asked: int, local: int, message: str, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    with pytest.raises(ValueError, match=message):
        Ranks(0, 24, torch.device("cpu"), None).replicas(asked)


def test_a_policy_on_meta_stays_there(base_folder: Path):
    with join_ranks() as ranks:
        policy = shard(empty_policy(base_folder, torch.float32), ranks, "float32")
        assert {p.device.type for p in policy.parameters()} == {"meta"}
        assert all(isinstance(p, DTensor) for p in policy.parameters())


@pytest.mark.parametrize("each", [False, True])
def test_gradients_are_summed_when_they_are_to_be(each: bool):
    """Until then they are whole, and no parameter has one."""
    with join_ranks() as ranks:
        policy = shard(policy_of(small_model()), ranks, "float32").train()
        packed = pack([made_group(made_prompt("a", [4, 6], [(3, 4)]), [3, 1], seed=1)], policy.vlm.config, ranks.device)
        for last in (False, True):
            reduce_gradients(policy, last=last, each=each)
            policy(packed, 1.0).logp.sum().backward()
            assert all((weight.grad is not None) == (last or each) for weight in policy.parameters())
        twice = {name: weight.grad.full_tensor() for name, weight in policy.named_parameters()}
        policy.zero_grad()
        policy(packed, 1.0).logp.sum().backward()
        for name, weight in policy.named_parameters():
            torch.testing.assert_close(twice[name], 2 * weight.grad.full_tensor(), msg=name)
