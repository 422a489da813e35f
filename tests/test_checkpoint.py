"""Exports that plain transformers loads; checkpoints that run no code."""

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from transformers import Qwen2_5_VLForConditionalGeneration

from medground.checkpoint import _LayoutReader, export_policy, load_checkpoint, save_checkpoint
from medground.config import LoraConfig
from medground.datasets.manifest import load_records
from medground.policy import Policy, load_policy
from medground.prompts import load_processor, make_prompt
from medground.rollout.cache import Sampling
from medground.rollout.engine import Engine, Limits
from medground.sharding import Ranks, WholeCopy, compute_dtype, join_ranks, shard

ADAPTED = re.compile(r"^model\.layers.*_proj\.weight$")

PLAIN = """
import json, sys, torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
folder, given = sys.argv[1:]
assert "medground" not in sys.modules
model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
out = []
for prompt in torch.load(given, weights_only=True):
    ids = prompt["input_ids"][None]
    tokens = model.generate(
        input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), do_sample=False,
        pixel_values=prompt["pixel_values"], image_grid_thw=prompt["image_grid_thw"], max_new_tokens=24,
    )[0, ids.shape[1]:]
    out.append([tokens.tolist(), tokenizer.decode(tokens, skip_special_tokens=True)])
print(json.dumps(out))
"""


def moved(base_folder: Path):
    """A policy that is not the base model, and its optimizer."""
    policy = load_policy(base_folder)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return policy


def test_the_export_speaks_as_the_policy_does(base_folder: Path, phantoms: Path, tmp_path: Path):
    processor = load_processor(base_folder, 56 * 56, 56 * 56)
    examples = load_records(phantoms)[:4]
    prompts = [make_prompt(e, Image.open(phantoms / e.image).convert("RGB"), processor, "brief") for e in examples]
    with join_ranks() as ranks:
        policy = shard(moved(base_folder), ranks, "float32")
        whole = WholeCopy(policy, ranks, "float32").refresh()
        engine = Engine(whole, processor.tokenizer, Limits(100, 24, 8, 1e9, 1000))
        found = dict(engine.roll_out(prompts, count=4, copies=1, sampling=Sampling(0.0)))
        export_policy(tmp_path / "export", policy, base_folder, ranks)
    fields = ("input_ids", "pixel_values", "image_grid_thw")
    torch.save([{name: getattr(p, name) for name in fields} for p in prompts], tmp_path / "prompts.pt")
    (tmp_path / "plain.py").write_text(PLAIN)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "plain.py"), str(tmp_path / "export"), str(tmp_path / "prompts.pt")],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    want = [[g.rollouts[0].tokens.tolist(), g.rollouts[0].text] for _, g in sorted(found.items())]
    assert json.loads(done.stdout.splitlines()[-1]) == want


def test_the_export_keeps_the_folders_dtype_and_layout(base_folder: Path, tmp_path: Path):
    half = tmp_path / "half"
    policy = load_policy(base_folder)
    policy.vlm.to(torch.bfloat16).save_pretrained(half)
    for file in base_folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (half / file.name).write_bytes(file.read_bytes())
    with join_ranks() as ranks:
        export_policy(tmp_path / "export", shard(load_policy(half), ranks, "float32"), half, ranks)
    before, after = load_file(half / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(before[name], after[name]) for name in before)
    assert {p.name for p in (tmp_path / "export").iterdir()} >= {"tokenizer.json", "preprocessor_config.json"}


def test_tied_weights_are_exported_once(base_folder: Path, tmp_path: Path):
    policy = load_policy(base_folder)
    policy.vlm.config.tie_word_embeddings = policy.vlm.config.text_config.tie_word_embeddings = True
    policy.vlm.lm_head.weight = policy.vlm.model.language_model.embed_tokens.weight
    with join_ranks() as ranks:
        sharded = shard(policy, ranks, "float32")
        export_policy(tmp_path / "export", sharded, base_folder, ranks)
    names = load_file(tmp_path / "export" / "model.safetensors").keys()
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    again = load_policy(tmp_path / "export").vlm
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight


def adapted(folder: Path, lora: LoraConfig, ranks: Ranks, precision: str = "float32") -> Policy:
    """A sharded policy whose adapters are more than zeros."""
    policy = load_policy(folder, compute_dtype(ranks, precision))
    policy.add_adapters(lora, seed=1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return shard(policy, ranks, precision)


def half_and_tied(base_folder: Path, folder: Path) -> Path:
    """The base model as the hub has Qwen2.5-VL-3B: bfloat16, embedding and head one."""
    policy = load_policy(base_folder)
    policy.vlm.config.tie_word_embeddings = policy.vlm.config.text_config.tie_word_embeddings = True
    policy.vlm.tie_weights()
    shutil.copytree(base_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    policy.vlm.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16 and tied"])
def test_adapters_are_exported_merged_and_alone(half: bool, base_folder: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    folder, dtype = base_folder, torch.float32
    if half:
        folder, dtype = half_and_tied(base_folder, tmp_path / "half"), torch.bfloat16
    with join_ranks() as ranks:
        policy = adapted(folder, LoraConfig(rank=4, alpha=8), ranks, str(dtype).removeprefix("torch."))
        weights = {name.removeprefix("vlm."): p.full_tensor().detach() for name, p in policy.named_parameters()}
        export_policy(tmp_path / "export", policy, folder, ranks, "a name on the hub")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert before.keys() == after.keys() and all(weight.dtype == dtype for weight in after.values())
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if ADAPTED.search(n)}
    own = load_file(tmp_path / "export" / "adapter" / "adapter_model.safetensors")
    trained = {name: weight for name, weight in weights.items() if ".lora_" in name}
    assert own.keys() == {f"base_model.model.{name.replace('.default', '')}" for name in trained}
    for name, weight in trained.items():
        assert torch.equal(own[f"base_model.model.{name.replace('.default', '')}"], weight), name
    config = json.loads((tmp_path / "export" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a name on the hub" and config["lora_alpha"] == 8

    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain, base = load(tmp_path / "export", dtype="auto"), load(folder, dtype="auto")
        want, old = plain(input_ids=ids).logits, base(input_ids=ids).logits
        beside = peft.PeftModel.from_pretrained(base, tmp_path / "export" / "adapter")
        found = beside(input_ids=ids).logits
    assert plain.dtype == base.dtype == dtype and (want - old).abs().max() > 0.5
    torch.testing.assert_close(found, want, atol=0.1 if half else 1e-4, rtol=0)


def test_a_checkpoint_has_the_adapters_alone(base_folder: Path, tmp_path: Path):
    pytest.importorskip("peft")
    lora = LoraConfig(rank=4, alpha=8)
    with join_ranks() as ranks:
        policy = adapted(base_folder, lora, ranks)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        save_checkpoint(tmp_path, 3, policy, torch.optim.AdamW(trained), ranks, keep=2)
        names = _LayoutReader(tmp_path / "step-000003").read_metadata().state_dict_metadata
        assert len(names) == 4 * len(trained) and all(".lora_" in name for name in names)
        again = adapted(base_folder, lora, ranks)
        moments = torch.optim.AdamW([parameter for parameter in again.parameters() if parameter.requires_grad])
        assert load_checkpoint(tmp_path, again, moments) == 3
        for ours, theirs in zip(again.parameters(), policy.parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), theirs.full_tensor())
        for field, other in (("rank", 2), ("alpha", 4), ("targets", "mlp")):
            policy = adapted(base_folder, dataclasses.replace(lora, **{field: other}), ranks)
            said = f"step-000003: want a checkpoint of model.lora.{field} {other!r}; got {getattr(lora, field)!r}"
            with pytest.raises(ValueError, match=said):
                load_checkpoint(tmp_path, policy, moments)
        with pytest.raises(ValueError, match=r"step-000003: want a checkpoint of model\.lora\.rank 0; got 4"):
            load_checkpoint(tmp_path, shard(load_policy(base_folder), ranks, "float32"), moments)


@pytest.fixture
def saved(base_folder: Path, tmp_path: Path):
    """A saved checkpoint, with what it takes to load it."""
    with join_ranks() as ranks:
        policy = shard(moved(base_folder), ranks, "float32")
        optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
        save_checkpoint(tmp_path, 3, policy, optimizer, ranks, keep=2)
        yield tmp_path, policy, optimizer, ranks


def test_the_newest_are_kept(saved):
    folder, policy, optimizer, ranks = saved
    (folder / ".step-000009.partial").mkdir()
    for step in (7, 11):
        save_checkpoint(folder, step, policy, optimizer, ranks, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000007", "step-000011"]
    assert load_checkpoint(folder, policy, optimizer) == 11


def test_a_folder_without_its_state_file_is_no_checkpoint(saved):
    folder, policy, optimizer, _ = saved
    (folder / "step-000099").mkdir()
    assert load_checkpoint(folder, policy, optimizer) == 3
    assert load_checkpoint(folder / "elsewhere", policy, optimizer) == 0


class _Malice:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_malicious_pickle_is_not_executed(saved):
    folder, policy, optimizer, _ = saved
    trap = folder / "executed"
    (folder / "step-000003" / ".metadata").write_bytes(pickle.dumps(_Malice(trap)))
    with pytest.raises(ValueError, match="not the layout of a checkpoint: it names"):
        load_checkpoint(folder, policy, optimizer)
    assert not trap.exists()


def test_a_tensor_that_claims_to_be_bytes_is_not_unpickled(saved):
    """DCP would read such an entry with torch.load(weights_only=False)."""
    folder, policy, optimizer, _ = saved
    trap = folder / "executed"
    layout = folder / "step-000003" / ".metadata"
    metadata = pickle.loads(layout.read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    index = next(index for index in metadata.storage_data if index.fqn == name)
    torch.save(_Malice(trap), folder / "step-000003" / "payload")
    size = (folder / "step-000003" / "payload").stat().st_size
    metadata.storage_data[MetadataIndex(name)] = dataclasses.replace(
        metadata.storage_data.pop(index), relative_path="payload", offset=0, length=size
    )
    layout.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"it names .*BytesStorageMetadata"):
        load_checkpoint(folder, policy, optimizer)
    assert not trap.exists()


def test_the_layout_holds_tensors_alone(saved):
    folder, *_ = saved
    metadata = _LayoutReader(folder / "step-000003").read_metadata()
    kinds = {type(entry).__name__ for entry in metadata.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}
