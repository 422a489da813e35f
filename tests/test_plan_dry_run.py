"""A dry run against bytes counted by hand, against what options must do, and against the same step truly run."""

from dataclasses import replace

import pytest
import torch
from plan_cases import GROUP, IMAGE, SHAPE, TEXT, C, lora, made_config, made_job
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.planned import LiveBytes
from medground.plan.dry_run import dry_run
from medground.plan.fit import scaled
from medground.plan.rehearsal import Rehearsal
from medground.plan.shapes import PUBLISHED, Architecture, model_config
from medground.plan.workload import largest_micro_batch
from medground.policy import Policy
from medground.sharding import join_ranks


def run(config, ranks=1, cuda=False):
    return dry_run(made_job(config), config, ranks, cuda=cuda)[0]


def weights_of(config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(Qwen2_5_VLForConditionalGeneration(made_job(config).model).named_parameters())


def shard_bytes(weights, ranks: int, itemsize: int) -> int:
    """Of the rank with most: rows of the first dimension, rounded up."""
    return sum(itemsize * -(-len(w) // ranks) * w[0].numel() for w in weights)


def test_what_a_rank_holds_is_what_counting_says(tmp_path):
    ranks = 3  # which no dimension is a multiple of
    config = made_config(tmp_path, loss_beta=0.04, rollout_prompts_per_step=24)
    found, weights = run(config, ranks), weights_of(config).values()
    shard = shard_bytes(weights, ranks, 4)
    for phase in ("score", "update", "optimizer"):
        parts = found.peaks[phase].parts
        for name in ("weights", "reference"):
            assert 0 <= parts[name] - shard <= 4 * _buffers(config), (phase, name)
        assert parts["optimizer"] == 2 * shard + 4 * len(weights), "moments and AdamW's count of steps"
        assert parts["rollout_weights"] == 4 * (sum(w.numel() for w in weights) + _buffers(config))
    assert found.peaks["optimizer"].parts["gradients"] == shard
    # keys and values of 8 rows of 4 groups, each prompt once; the rows' state is a little more
    token = 2 * SHAPE.layers * SHAPE.kv_heads * (SHAPE.hidden // SHAPE.heads) * 4
    keys = token * (4 * (TEXT + IMAGE) + 8 * C)
    assert keys < found.peaks["update"].parts["cache"] < keys + 10_000
    assert found.peaks["evaluation"].parts["cache"] <= 1e6 + 40_000
    # what is reckoned for other ranks is near what they take
    for others in (6,):
        assert scaled(found.peaks, ranks, others) == pytest.approx(run(config, others).highest.total, rel=0.02)


def _buffers(config) -> int:
    with torch.device("meta"):
        policy = Policy(Qwen2_5_VLForConditionalGeneration(made_job(config).model))
    return sum(buffer.numel() for buffer in policy.buffers())


def test_on_a_gpu_weights_that_decode_and_compute_are_half_as_large(tmp_path):
    config = made_config(tmp_path, model_precision="auto")
    found, weights = run(config, 2, cuda=True), weights_of(config).values()
    parts = found.peaks["update"].parts
    exact = 2 * sum(w.numel() for w in weights)
    assert exact <= parts["rollout_weights"] <= exact + 512 * (len(weights) + 8), "512 bytes at a time"
    assert found.facts.model.itemsize == 2 and found.facts.gathered == exact
    shard = shard_bytes(weights, 2, 4)
    assert shard <= parts["weights"] <= shard + 512 * (len(weights) + 8)


def test_collectives_move_what_the_seconds_reckon_with(tmp_path):
    config = made_config(tmp_path, loss_beta=0.04, model_activation_checkpointing="full")
    found = run(config, 2)
    facts, moved = found.facts, found.moved
    padding = 1.05  # dimensions that two ranks do not divide
    assert found.micro_batches == 2
    assert facts.gathered == 4 * sum(w.numel() for w in weights_of(config).values())
    # the reference's root unit stays whole from one micro-batch to the next
    assert facts.gathered <= _all("allgather", "score", moved) <= 2 * padding * facts.gathered
    update = facts.gathered + facts.gathered_again
    assert update <= _all("allgather", "update", moved) / 2 <= padding * update
    assert facts.reduced <= _all("reduce_scatter", "update", moved) <= padding * facts.reduced
    assert facts.gathered <= _all("allgather", "rollout", moved) <= padding * facts.gathered
    assert not _all("", "prefill", moved)


def test_a_frozen_tower_is_not_gathered_again(tmp_path):
    config = made_config(tmp_path, model_freeze_vision=True)
    found = run(config, 2)
    facts = found.facts
    again = _all("allgather", "update", found.moved) / found.micro_batches - facts.gathered
    block = 4 * sum(w.numel() for name, w in weights_of(config).items() if "visual.blocks.1." in name)
    assert facts.gathered_again <= again <= 1.05 * (facts.gathered_again + block), "FSDP2 prefetches one in vain"
    assert facts.reduced < facts.gathered


def _all(kind: str, phase: str, moved) -> int:
    return sum(size for (of, name), size in moved.items() if of == phase and kind in name)


def test_options_that_save_memory_do(tmp_path):
    wide = replace(SHAPE, layers=4)
    plain = run(made_config(tmp_path, wide))
    recomputed = run(made_config(tmp_path, wide, model_activation_checkpointing="full", loss_beta=0.04))
    assert recomputed.peaks["update"].parts["activations"] < 0.5 * plain.peaks["update"].parts["activations"]
    reference = recomputed.peaks["update"].parts["reference"]
    assert recomputed.peaks["update"].total - reference < plain.peaks["update"].total
    assert "reference" not in plain.peaks["update"].parts


def test_whole_gradients_wait_for_the_last_micro_batch(tmp_path):
    several, one = (run(made_config(tmp_path, loss_micro_batch_tokens=n * GROUP), 2) for n in (3, 4))
    assert (several.micro_batches, one.micro_batches) == (2, 1)
    weights = 4 * sum(w.numel() for w in weights_of(made_config(tmp_path)).values())
    # all but a unit that is being reduced
    assert weights * 0.8 < several.peaks["update"].parts["whole_gradients"]
    assert one.peaks["update"].parts.get("whole_gradients", 0) < weights * 0.5


def test_adapters_train_little_and_keep_no_reference(tmp_path):
    pytest.importorskip("peft")
    found = run(made_config(tmp_path, loss_beta=0.04, **lora()), 2)
    parts = found.peaks["update"].parts
    assert "reference" not in parts and found.facts.model.parameters < 0.1 * found.facts.gathered / 4
    trained = found.facts.model.parameters * 4 / 2
    assert parts["optimizer"] == pytest.approx(2 * trained, rel=0.05)
    assert found.facts.reduced == 4 * found.facts.model.parameters


def test_the_largest_micro_batch_is_the_worst_that_is_allowed(tmp_path):
    config = made_config(tmp_path, loss_micro_batch_tokens=3 * GROUP - 1)
    batch = largest_micro_batch(config, made_job(config).prompt, 2)
    # four short groups fill the tokens that two and a half long ones would, with twice the images
    assert len(batch.lengths) == 4 and batch.tokens == 3 * GROUP - 1 and batch.number == 2
    assert sum(map(sum, batch.lengths)) == batch.tokens - 4 * (TEXT + IMAGE)
    assert max(map(max, batch.lengths)) - min(map(min, batch.lengths)) == 1
    whole = largest_micro_batch(
        replace(config, loss=replace(config.loss, micro_batch_tokens=10**6)), made_job(config).prompt, 2
    )
    assert (len(whole.lengths), whole.tokens, whole.number) == (4, 4 * GROUP, 1)


@pytest.mark.parametrize("name, config", [("full", {}), ("adapters", {"model_activation_checkpointing": "full"})])
def test_the_real_step_takes_what_was_predicted(tmp_path, name, config):
    """In this process, on a model of a few MB, by live bytes; bench.planned has the resident size of larger ones."""
    if name == "adapters":
        pytest.importorskip("peft")
        config = config | lora(16)
    shape = Architecture(192, 3, 4, 2, 512, 2048, False, 2, 96, 4, 192, (1,))
    config = made_config(tmp_path, shape, loss_micro_batch_tokens=4 * GROUP, **config)
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(made_job(config).model).save_pretrained(tmp_path)
    predicted, meter = run(config), LiveBytes()
    with join_ranks() as ranks:
        step = Rehearsal(made_job(config), config, tmp_path, ranks, meter)
        step.roll_out()
        step.update()
    for phase in ("score", "update", "optimizer"):
        assert predicted.peaks[phase].total == pytest.approx(meter.peaks[phase], rel=0.1), phase


def test_published_shapes_are_counted_right():
    sizes = {"3b": 3.75e9, "7b": 8.29e9}
    for name, want in sizes.items():
        config = model_config(f"Qwen/Qwen2.5-VL-{name.upper()}-Instruct")
        with torch.device("meta"):
            vlm = Qwen2_5_VLForConditionalGeneration(config)
        assert sum(w.numel() for w in vlm.parameters()) == pytest.approx(want, rel=0.002)
        assert config.text_config.hidden_size == PUBLISHED[name].hidden


def test_moments_in_8_bits(tmp_path):
    pytest.importorskip("torchao")
    wide = Architecture(256, 1, 4, 2, 512, 2048, False, 1, 64, 2, 256, (0,))
    config = made_config(tmp_path, wide, optimizer_kind="adamw-8bit")
    found, weights = run(config, 2), weights_of(config).values()
    large = sum(w.numel() for w in weights if w.numel() >= 4096 and not w[0].numel() % 64) / 2
    small = sum(w.numel() for w in weights) / 2 - large
    assert found.peaks["update"].parts["optimizer"] == pytest.approx(large * 2 * (1 + 4 / 256) + small * 8, rel=0.05)
