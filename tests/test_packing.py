"""One stream with each prompt once against G padded rows as transformers runs them: log-probabilities and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import IMAGE, made_group, made_prompt, policy_of, rolled, small_model

from bench.unpacked import pad_rows, unpacked_logp
from medground.activation_checkpointing import checkpoint_activations
from medground.packing import pack, pack_prompts
from medground.records import Group

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VLM = small_model().to(DEVICE)
POLICY = policy_of(VLM).to(DEVICE)
CONFIG = POLICY.vlm.config

images = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=3)
prompts = images.flatmap(
    lambda sizes: st.tuples(
        st.lists(st.integers(1, 9), min_size=len(sizes) + 1, max_size=len(sizes) + 1), st.just(sizes)
    )
)
completions = st.sampled_from([1, 2, 8, 17]).flatmap(
    lambda G: st.lists(st.sampled_from([1, 2, 5, 13, 30]), min_size=G, max_size=G)
)
groups_of = st.lists(st.tuples(prompts, completions), min_size=1, max_size=4).map(
    lambda specs: [
        made_group(made_prompt(f"p{i}", texts, images, seed=i), lengths, seed=i)
        for i, ((texts, images), lengths) in enumerate(specs)
    ]
)


def gradients(model: torch.nn.Module, logp: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logp * weights).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    total = torch.cat([g.flatten() for g in theirs.values()]).norm()
    for name, want in theirs.items():
        # relative to the tensor's own size, but for those that are rounding noise of the whole
        assert (ours[name] - want).norm() <= 5e-6 * max(want.norm(), 1e-2 * total), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(groups_of, st.sampled_from([1.0, 0.7]))
def test_the_stream_equals_padded_rows(groups: list[Group], temperature: float):
    logp = POLICY(pack(groups, CONFIG, DEVICE), temperature).logp
    want = unpacked_logp(VLM, pad_rows(groups, IMAGE, DEVICE), temperature)
    torch.testing.assert_close(logp, want, atol=5e-6, rtol=0)
    weights = torch.linspace(-1, 1, len(want), device=DEVICE) / len(want) ** 0.5
    assert_equal_gradients(gradients(POLICY.vlm, logp, weights), gradients(VLM, want, weights))


def some_groups() -> list[Group]:
    first = made_prompt("a", [4, 6], [(3, 4)])
    return [
        made_group(first, [3, 1, 9], seed=1),
        made_group(made_prompt("b", [5]), [4, 7], seed=2),
        made_group(made_prompt("c", [2, 3, 1], [(2, 2), (5, 3)], seed=3), [6], seed=3),
    ]


@pytest.mark.parametrize("how", ["checkpointed", "compiled and checkpointed"])
def test_checkpointed_and_compiled_layers_change_nothing(how: str):
    """Compiled once for all lengths; the compiler itself is left out, whose making of C takes a minute."""
    policy = policy_of(VLM).to(DEVICE)
    checkpoint_activations(policy.vlm, "full")
    if how != "checkpointed":
        torch.compiler.reset()
        policy.compile_layers(backend="aot_eager")
    policy.train()
    everything = some_groups()
    for groups in (everything, everything[:1], everything[1:]):
        torch._dynamo.utils.counters.clear()
        packed = pack(groups, CONFIG, DEVICE)
        weights = torch.linspace(-1, 1, len(packed.targets), device=DEVICE)
        logp, want = policy(packed, 1.0).logp, POLICY(packed, 1.0).logp
        torch.testing.assert_close(logp, want, atol=5e-6, rtol=0)
        assert_equal_gradients(gradients(policy.vlm, logp, weights), gradients(POLICY.vlm, want, weights))
    if how != "checkpointed":
        assert not torch._dynamo.utils.counters["stats"]["unique_graphs"], "the last lengths compiled anew"


def test_a_shared_image_is_seen_once():
    shared = made_prompt("a", [4, 6], [(3, 4)])
    other = made_prompt("b", [2, 5], [(2, 3)], seed=1)
    groups = [made_group(p, [2, 3], seed=i) for i, p in enumerate((shared, other, shared))]
    packed = pack(groups, CONFIG, DEVICE)
    assert packed.image_grids == [[1, 6, 8], [1, 4, 6]] and len(packed.pixel_values) == 48 + 24
    assert packed.image_from.tolist() == [*range(12), *range(12, 18), *range(12)]
    want = unpacked_logp(VLM, pad_rows(groups, IMAGE, DEVICE), 1.0)
    torch.testing.assert_close(POLICY(packed, 1.0).logp, want, atol=5e-6, rtol=0)


def test_features_go_to_the_prompt_alone():
    """An image token that was sampled is a token like others."""
    prompt = made_prompt("a", [4, 6], [(3, 4)])
    tokens = torch.tensor([3, IMAGE, IMAGE, 8])
    packed = pack([Group(prompt, (rolled(tokens), rolled(tokens.flip(0))))], CONFIG, DEVICE)
    assert packed.image_at.max() < len(prompt.input_ids)
    assert POLICY(packed, 1.0).logp.isfinite().all()


def test_the_vision_tower_takes_part_without_an_image():
    """Under FSDP2 a rank whose micro-batch has no image would leave the others waiting."""
    logp = POLICY(pack([made_group(made_prompt("b", [5]), [4, 7])], CONFIG, DEVICE), 1.0).logp
    POLICY.zero_grad()
    logp.sum().backward()
    for name, parameter in POLICY.vlm.model.visual.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_what_the_stream_looks_like():
    prompt = made_prompt("a", [1, 2], [(1, 2)])  # text, start, image, image, end, text, text
    packed = pack([made_group(prompt, [2, 1]), made_group(made_prompt("b", [3]), [1])], CONFIG, DEVICE)
    assert packed.position_ids.tolist() == [
        [0, 1, 2, 2, 4, 5, 6, 7, 8, 7, 0, 1, 2, 3],
        [0, 1, 2, 2, 4, 5, 6, 7, 8, 7, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 0, 1, 2, 3],
    ]
    assert packed.scored.tolist() == [6, 7, 6, 12]
    assert packed.targets.tolist() == packed.input_ids[[7, 8, 9, 13]].tolist()
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 4] and packed.cu_seqlens.dtype == torch.int32
    assert packed.ends.tolist() == [6, 12] and packed.image_at.tolist() == [2, 3]
    alone = pack_prompts([prompt], CONFIG, DEVICE)
    assert len(alone.input_ids) == 7 and len(alone.scored) == len(alone.targets) == 0


def test_mistakes_name_the_record():
    prompt = made_prompt("film-7", [4, 6], [(3, 4)])
    with pytest.raises(ValueError, match="record film-7: want completions of one token or more; got none"):
        pack([Group(prompt, ())], CONFIG, DEVICE)
    with pytest.raises(ValueError, match=r"record film-7: want completions of one token or more; got \[3, 0\]"):
        pack([made_group(prompt, [3, 0])], CONFIG, DEVICE)
    short = made_prompt("film-8", [4, 6], [(3, 4)])
    short.input_ids[4:6] = 0
    with pytest.raises(ValueError, match="record film-8: want 12 image tokens for its images; got 11"):
        pack([made_group(short, [3])], CONFIG, DEVICE)
