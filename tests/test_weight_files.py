"""Weights of a model folder: bit for bit those that transformers loads, row by row; and folders that are not whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stream_cases import small_model
from transformers import Qwen2_5_VLForConditionalGeneration

from medground import weight_files
from medground.policy import empty_policy
from medground.weight_files import check_weights, read_weights, stored_weights, weights_hash

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32, shards: str = "1GB") -> Path:
    vlm = small_model()
    vlm.config.tie_word_embeddings = vlm.config.text_config.tie_word_embeddings = tied
    vlm.tie_weights()
    vlm.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Other names for the tensors of a folder of one file."""
    file = folder / "model.safetensors"
    save_file({change(name): weight for name, weight in load_file(file).items()}, file, {"format": "pt"})


def modern(name: str) -> str:
    """As later versions of transformers write them."""
    return re.sub(r"^model\.(?!visual)", "model.language_model.", re.sub(r"^visual\.", "model.visual.", name))


def read(folder: Path, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    vlm = empty_policy(folder, dtype).vlm
    buffers = dict(vlm.named_buffers())
    stored = check_weights(vlm, folder)
    vlm.to_empty(device="cpu").tie_weights()
    read_weights(vlm, stored, lambda parameter: (parameter.data, 0, len(parameter)))
    for name, buffer in buffers.items():
        module, _, own = name.rpartition(".")
        setattr(vlm.get_submodule(module), own, buffer)
    return vlm


@pytest.mark.parametrize(
    ("tied", "stored", "wanted", "shards", "names"),
    [
        (False, torch.float32, torch.float32, "1GB", "hub"),
        (True, torch.bfloat16, torch.float32, "1GB", "hub"),  # master weights of a file in half
        (False, torch.bfloat16, torch.bfloat16, "50KB", "hub"),
        (True, torch.float32, torch.bfloat16, "1GB", "modern"),  # frozen weights of a file in single
    ],
)
def test_it_is_what_transformers_loads(tied, stored, wanted, shards, names, tmp_path: Path):
    save(tmp_path, tied, stored, shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > (shards != "1GB") * 3
    if names == "modern":
        rename(tmp_path, modern)
        assert "model.language_model.norm.weight" in load_file(tmp_path / "model.safetensors")
    ours, theirs = read(tmp_path, wanted), Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=wanted)
    weights = dict(ours.named_parameters())
    assert weights.keys() == dict(theirs.named_parameters()).keys()
    for name, weight in theirs.named_parameters():
        assert weights[name].dtype == wanted and torch.equal(weights[name], weight), name
    buffers = dict(ours.named_buffers())
    assert len(buffers) == 4
    for name, buffer in theirs.named_buffers():
        assert buffers[name].dtype == torch.float32 and torch.equal(buffers[name], buffer), name
    assert (ours.lm_head.weight is ours.model.language_model.embed_tokens.weight) == tied
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.config.to_dict() == theirs.config.to_dict()


def test_only_the_rows_asked_for_are_filled(tmp_path: Path):
    vlm = empty_policy(save(tmp_path), torch.float32).vlm
    stored = check_weights(vlm, tmp_path)
    vlm.to_empty(device="cpu")
    for parameter in vlm.parameters():
        parameter.data.fill_(torch.nan)
    read_weights(vlm, stored, lambda weight: (weight.data[len(weight) // 3 : -1], len(weight) // 3, len(weight) - 1))
    whole = dict(small_model().named_parameters())
    for name, parameter in vlm.named_parameters():
        middle = slice(len(parameter) // 3, -1)
        assert torch.equal(parameter[middle], whole[name][middle])
        assert parameter[: len(parameter) // 3].isnan().all() and parameter[-1].isnan().all()


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the only file, or leave them out."""
    file = folder / "model.safetensors"
    weights = load_file(file) | changes
    save_file({name: weight for name, weight in weights.items() if weight is not None}, file)


def index(folder: Path, text: str | dict) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    text = text if isinstance(text, str) else json.dumps({"weight_map": text})
    (folder / "model.safetensors.index.json").write_text(text)


NORM = "model.norm.weight"
ALL = {name: "a.safetensors" for name in ("model.norm.weight", "lm_head.weight")}
FAULTS = {
    "missing": (lambda f: change(f, **{NORM: None}), "want tensor 'model.language_model.norm.weight' in its"),
    "of another model": (lambda f: change(f, extra=torch.ones(2)), "model.safetensors: want .* got 'extra'"),
    "rotary": (lambda f: change(f, **{"model.rotary_emb.inv_freq": torch.ones(8)}), "got 'model.rotary_emb.inv_freq'"),
    "shape": (lambda f: change(f, **{NORM: torch.ones(3)}), r"'model.norm.weight' of shape \[64\]; got \[3\]"),
    "codes": (lambda f: change(f, **{NORM: torch.ones(64).char()}), r"'model.norm.weight' in one of F64.*; got I8"),
    "twice": (lambda f: change(f, **{"model.language_model.norm.weight": torch.ones(64)}), "want each tensor once"),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-10]),
        "model.safetensors: want a .safetensors file; ",
    ),
    "no file": (lambda f: (f / "model.safetensors").rename(f / "model.bin"), "want model.safetensors or model.safet"),
    "above": (
        lambda f: index(f, ALL | {"x": "../a.safetensors"}),
        "of the same folder for 'x'; got '../a.safetensors'",
    ),
    "absolute": (lambda f: index(f, ALL | {"x": f"{f}/a.safetensors"}), "of the same folder for 'x'; got '/"),
    "pickle": (lambda f: index(f, ALL | {"x": "pytorch_model.bin"}), "of the same folder for 'x'; got 'pytorch_model"),
    "no such file": (
        lambda f: index(f, ALL | {"x": "b.safetensors"}),
        "b.safetensors: want a file with weights; it is",
    ),
    "not in it": (lambda f: index(f, ALL | {"x": "a.safetensors"}), "a.safetensors: want tensor 'x', which the index"),
    "no JSON": (lambda f: index(f, "{"), "index.json: want an index of .safetensors files"),
    "no map": (lambda f: index(f, "[]"), "index.json: want an index of .safetensors files"),
    "no names": (lambda f: index(f, '{"weight_map": {"x": 3}}'), "index.json: want an index of .safetensors files"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused(fault: str, good: Path, tmp_path: Path):
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil, message = FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        check_weights(empty_policy_of(good), tmp_path)
    assert str(tmp_path) in str(refusal.value)


def empty_policy_of(good: Path) -> torch.nn.Module:
    return empty_policy(good, torch.float32).vlm


def test_an_index_of_all_is_taken(good: Path, tmp_path: Path):
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = load_file(tmp_path / "model.safetensors").keys()
    index(tmp_path, dict.fromkeys(names, "a.safetensors"))
    assert check_weights(empty_policy_of(good), tmp_path).keys() == stored_weights(good).keys()


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path: Path):
    save(tmp_path, tied=True)
    weight = load_file(tmp_path / "model.safetensors")[EMBEDDING]
    change(tmp_path, **{HEAD: weight.clone()})
    assert read(tmp_path, torch.float32).lm_head.weight is not None
    change(tmp_path, **{HEAD: weight + 1})
    with pytest.raises(ValueError, match=r"model.safetensors: want 'lm_head.weight' to be the embedding, to which"):
        read(tmp_path, torch.float32)
    change(tmp_path, **{HEAD: weight[1:].clone()})
    with pytest.raises(ValueError, match=r"model.safetensors: want .* got 'lm_head.weight'"):
        read(tmp_path, torch.float32)


def test_a_hash_of_weights_changes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, before = weights_hash(tmp_path), file.read_bytes()
    assert weights_hash(tmp_path) == whole
    for at in (0, len(before) // 3, len(before) - 1):
        file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        assert weights_hash(tmp_path) != whole, "a small file is read whole"
    file.write_bytes(before)
    monkeypatch.setattr(weight_files, "_STRETCH", 100)  # now it is a large one
    partly = weights_hash(tmp_path)
    assert partly != whole
    for at in (5, len(before) - 1):  # in its first and its last stretch
        file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        assert weights_hash(tmp_path) != partly
    file.write_bytes(before + b"x")
    assert weights_hash(tmp_path) != partly, "another size"
    (tmp_path / "config.json").write_text("{}")
    file.write_bytes(before)
    assert weights_hash(tmp_path) != partly
