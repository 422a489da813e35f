"""Rollouts against transformers' generate and against each other; log-probs against the training forward."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from medground.datasets.manifest import load_records
from medground.policy import Policy, load_policy, pack_rows
from medground.prompts import Processor, load_processor, make_prompt
from medground.records import Prompt
from medground.rollout import roll_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def model(base_folder: Path) -> tuple[Policy, Processor]:
    return load_policy(base_folder).eval().to(DEVICE), load_processor(base_folder, 28 * 28, 84 * 84)


@pytest.fixture(scope="module")
def prompts(phantoms: Path, model) -> list[Prompt]:
    """Prompts of several lengths and image sizes."""
    shapes = [(56, 56), (84, 56), (28, 84), (56, 28), (84, 84)]
    examples = load_records(phantoms)[: len(shapes)]
    images = [Image.open(phantoms / e.image).convert("RGB").resize(s) for e, s in zip(examples, shapes, strict=True)]
    templates = ["brief", "plain", "brief", "patient-side", "brief"]
    return [make_prompt(e, i, model[1], t) for e, i, t in zip(examples, images, templates, strict=True)]


def sample(model, prompts, **changes):
    options = {"copies": 3, "max_new_tokens": 20, "temperature": 1.0, "seed": 7, "step": 2} | changes
    with torch.no_grad():
        return roll_out(model[0], model[1].tokenizer, prompts, **options)


def test_greedy_equals_generate(model, prompts):
    policy, processor = model
    for prompt, group in zip(prompts, sample(model, prompts, temperature=0.0, copies=1), strict=True):
        out = policy.vlm.generate(
            input_ids=prompt.input_ids[None].to(DEVICE),
            mm_token_type_ids=(prompt.input_ids == policy.image_token).int()[None].to(DEVICE),
            pixel_values=prompt.pixel_values.to(DEVICE),
            image_grid_thw=prompt.image_grid_thw.to(DEVICE),
            do_sample=False,
            max_new_tokens=20,
            suppress_tokens=policy.never_sampled,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        assert group.rollouts[0].tokens.tolist() == out[0, len(prompt.input_ids) :].tolist()


def test_a_completion_depends_on_nothing_but_its_own_stream(model, prompts):
    together = sample(model, prompts)
    alone = [group for prompt in reversed(prompts) for group in sample(model, [prompt], copies=5)][::-1]
    for a, b in zip(together, alone, strict=True):
        for x, y in zip(a.rollouts, b.rollouts, strict=False):
            assert torch.equal(x.tokens, y.tokens)
            torch.testing.assert_close(x.logp, y.logp, atol=1e-5, rtol=0)
    texts = [r.text for g in together for r in g.rollouts]
    assert len(set(texts)) > len(texts) // 2
    for changed in ({"seed": 8}, {"step": 3}):
        other = sample(model, prompts, **changed)
        assert [r.text for g in other for r in g.rollouts] != texts


def test_logps_are_those_of_the_training_forward(model, prompts):
    groups = sample(model, prompts, temperature=0.8)
    assert len({len(r.tokens) for g in groups for r in g.rollouts}) > 1
    rows = pack_rows(groups, model[0].image_token, DEVICE)
    scored = model[0](rows, 0.8).logp.cpu()
    sampled = torch.cat([r.logp for g in groups for r in g.rollouts])
    torch.testing.assert_close(scored, sampled, atol=1e-5, rtol=0)


def test_rows_score_as_one_row_at_a_time(model, prompts):
    groups = sample(model, prompts)
    policy = model[0]
    scored = policy(pack_rows(groups, policy.image_token, DEVICE), 1.0).logp.cpu()
    at = 0
    for group in groups:
        prompt = group.prompt
        for rollout in group.rollouts:
            ids = torch.cat([prompt.input_ids, rollout.tokens])[None].to(DEVICE)
            logits = (
                policy.vlm(
                    input_ids=ids,
                    mm_token_type_ids=(ids == policy.image_token).int(),
                    pixel_values=prompt.pixel_values.to(DEVICE),
                    image_grid_thw=prompt.image_grid_thw.to(DEVICE),
                )
                .logits[0, len(prompt.input_ids) - 1 : -1]
                .cpu()
            )
            want = logits.log_softmax(-1).gather(-1, rollout.tokens[:, None])[:, 0]
            torch.testing.assert_close(scored[at : at + len(want)], want, atol=1e-5, rtol=0)
            at += len(want)
    assert at == len(scored)


def test_stop_token_ends_a_completion_and_the_limit_cuts_it(model, prompts):
    stop = model[1].tokenizer.eos_token_id
    for group in sample(model, prompts, copies=8, max_new_tokens=24):
        for rollout in group.rollouts:
            assert rollout.finished == (int(rollout.tokens[-1]) == stop)
            assert stop not in rollout.tokens[:-1]
            assert rollout.finished or len(rollout.tokens) == 24
            assert "<|im_end|>" not in rollout.text


def test_image_tokens_are_never_sampled(model, prompts):
    policy = model[0]
    head = policy.vlm.lm_head.weight
    before = head.detach().clone()
    # whatever the hidden state, one of an opposite pair is likelier than all other tokens together
    signs = torch.tensor([1.0, -1.0] * 2, device=DEVICE)[: len(policy.never_sampled), None]
    try:
        with torch.no_grad():
            head[policy.never_sampled] = head.abs().max() * 50 * signs
        for group in sample(model, prompts, copies=4, max_new_tokens=8):
            for rollout in group.rollouts:
                assert not set(rollout.tokens.tolist()) & set(policy.never_sampled)
    finally:
        with torch.no_grad():
            head.copy_(before)


def test_a_folder_that_is_no_such_model_is_named(tmp_path: Path, base_folder: Path):
    with pytest.raises(ValueError, match=r"want a model folder with config\.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="want model_type qwen2_5_vl; got 'bert'"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"want weights as \.safetensors"):
        load_policy(tmp_path)
