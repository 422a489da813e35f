"""Ranks: mistakes are everyone's, weights come back sharded."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from medground.config import LoraConfig
from medground.policy import load_policy
from medground.sharding import WholeCopy, join_ranks, shard


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
        frozen = whole.policy.vlm.lm_head.weight
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
            if not step:
                assert torch.equal(frozen, before["vlm.lm_head.weight"])
                frozen.zero_()
        assert not frozen.any(), "frozen weights are copied once"
