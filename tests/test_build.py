"""Policy, reference and optimizer as a configuration says: what is trained, in which dtype, and what they compute."""

from functools import partial
from pathlib import Path

import pytest
import torch
from stream_cases import made_group, made_prompt, small_model
from torch.distributed.tensor import DTensor

from medground.build import build_optimizer, build_policy, build_reference, build_whole
from medground.config import Config, DataConfig, LoraConfig, LossConfig, ModelConfig, OptimizerConfig, ShardingConfig
from medground.packing import pack
from medground.policy import load_policy
from medground.sharding import Ranks, WholeCopy, join_ranks

GROUPS = [made_group(made_prompt("a", [4, 6], [(3, 4)]), [3, 1, 9], seed=1)]
LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture
def ranks():
    with join_ranks() as ranks:
        yield ranks


def job(folder: Path, beta: float = 0.1, sharding: ShardingConfig | None = None, **model: object) -> Config:
    return Config(
        out="unused",
        steps=1,
        model=ModelConfig(path=str(folder), **{"precision": "float32"} | model),  # type: ignore[arg-type]
        data=DataConfig(path=("unused",)),
        sharding=sharding or ShardingConfig(),
        loss=LossConfig(beta=beta),
    )


def whole(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor() for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("how", ["all", "tower frozen", "offloaded", "half"])
def test_what_is_trained_is_float32(how: str, folder: Path, ranks: Ranks):
    config = job(
        folder,
        freeze_vision=how == "tower frozen",
        precision="bfloat16" if how == "half" else "float32",
        sharding=ShardingConfig(cpu_offload=how == "offloaded"),
    )
    policy, want = build_policy(folder, config, ranks), load_policy(folder)
    assert policy.training and all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    where = "cpu" if how == "offloaded" else ranks.device.type
    for name, weight in whole(policy).items():
        assert policy.get_parameter(name).to_local().device.type == where
        assert torch.equal(weight.cpu(), want.get_parameter(name)), name
        frozen = how == "tower frozen" and ".visual." in name
        assert policy.get_parameter(name).requires_grad != frozen
    for name, buffer in policy.named_buffers():
        assert buffer.device == ranks.device and torch.equal(buffer.cpu(), want.get_buffer(name))
    trained = sum(len(group["params"]) for group in build_optimizer(policy, config).param_groups)
    assert trained == sum(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_are_those_of_the_whole_model(precision: str, folder: Path, ranks: Ranks):
    pytest.importorskip("peft")
    policy = build_policy(folder, job(folder, precision=precision, lora=LORA), ranks)
    want = load_policy(folder, getattr(torch, precision))
    want.add_adapters(LORA, seed=0)
    for name, weight in whole(policy).items():
        known = want.get_parameter(name)
        assert weight.dtype == known.dtype and torch.equal(weight.cpu(), known), name
        assert policy.get_parameter(name).requires_grad == known.requires_grad == (".lora_" in name)
    assert policy.lora == LORA


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_reference_is_a_frozen_model_in_the_compute_dtype(precision: str, folder: Path, ranks: Ranks):
    config = job(folder, precision=precision)
    policy = build_policy(folder, config, ranks)
    reference = build_reference(policy, folder, config, ranks)
    assert {(p.dtype, p.requires_grad) for p in reference.parameters()} == {(getattr(torch, precision), False)}
    packed = pack(GROUPS, policy.vlm.config, ranks.device)
    with torch.no_grad():
        found, want = reference(packed, 0.7), policy(packed, 0.7)
    assert torch.equal(found.logp, want.logp), "before the first step they are one"
    assert all(isinstance(parameter, DTensor) for parameter in reference.parameters()), "no unit stays whole"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_only_asked_is_whole_and_frozen(tied: bool, dtype: torch.dtype, ranks: Ranks, tmp_path: Path):
    vlm = small_model()
    vlm.config.tie_word_embeddings = vlm.config.text_config.tie_word_embeddings = tied
    vlm.tie_weights()
    vlm.save_pretrained(tmp_path)
    policy, want = build_whole(tmp_path, dtype, ranks), load_policy(tmp_path, dtype)
    assert not policy.training
    for name, weight in want.named_parameters():
        found = policy.get_parameter(name)
        assert (found.dtype, found.requires_grad, found.device) == (dtype, False, ranks.device), name
        assert torch.equal(found.cpu(), weight), name
    for name, buffer in want.named_buffers():
        assert torch.equal(policy.get_buffer(name).cpu(), buffer) and buffer.dtype == torch.float32, name
    head, embedding = policy.vlm.lm_head.weight, policy.vlm.model.language_model.embed_tokens.weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied


def test_with_adapters_the_policy_is_its_own_reference(folder: Path):
    policy = partial(lambda packed, temperature, adapters: (packed, temperature, adapters))
    assert build_reference(policy, folder, job(folder, lora=LORA), None)("packed", 0.7) == ("packed", 0.7, False)
    assert build_reference(policy, folder, job(folder, beta=0.0, lora=LORA), None) is None
    assert build_reference(policy, folder, job(folder, beta=0.0), None) is None


def test_with_adapters_what_is_not_merged_is_there_once(folder: Path, ranks: Ranks):
    pytest.importorskip("peft")
    policy = build_policy(folder, job(folder, precision="bfloat16", lora=LORA), ranks)
    copy = WholeCopy(policy, ranks, "bfloat16").refresh()
    ours = {parameter.to_local().data_ptr() for parameter in policy.parameters()}
    own = [name for name, weight in copy.named_parameters() if weight.data_ptr() not in ours]
    assert own and all(name.endswith("_proj.weight") and ".layers." in name for name in own)
    assert len(own) == 7 * 3, "the products of each layer, which are merged"


@pytest.mark.parametrize("fault", ["policy", "reference"])
def test_a_faulty_folder_is_named(fault: str, folder: Path, ranks: Ranks, tmp_path: Path):
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 16)
    build = build_policy if fault == "policy" else partial(build_reference, None)
    with pytest.raises(ValueError, match=r"model.safetensors: want a .safetensors file"):
        build(tmp_path, job(tmp_path), ranks)


def test_options_reach_the_optimizer(folder: Path):
    options = OptimizerConfig(lr=3e-3, beta1=0.8, beta2=0.9, weight_decay=0.1)
    config = Config(out="x", steps=1, model=ModelConfig(path="x"), data=DataConfig(path=("x",)), optimizer=options)
    (group,) = build_optimizer(torch.nn.Linear(2, 2), config).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (3e-3, (0.8, 0.9), 0.1, True)
