"""Exports that plain transformers loads."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moved_policies import adapted, moved
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from medground import export as module
from medground.config import LoraConfig
from medground.datasets.manifest import load_records
from medground.export import export_policy
from medground.model_card import _how_to_load
from medground.policy import load_policy
from medground.prompts import load_processor, make_prompt, question_text
from medground.rollout.cache import Sampling
from medground.rollout.engine import Engine, Limits
from medground.sharding import WholeCopy, join_ranks, shard

ADAPTED = re.compile(r"^model\.layers.*_proj\.weight$")

PLAIN = """
import importlib.util, json, sys, torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
folder, given = sys.argv[1:]
assert "medground" not in sys.modules
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
out = []
for prompt in torch.load(given, weights_only=True):
    ids = prompt["input_ids"][None]
    tokens = model.generate(
        input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), do_sample=False,
        pixel_values=prompt["pixel_values"], image_grid_thw=prompt["image_grid_thw"], max_new_tokens=24,
    )[0, ids.shape[1]:]
    out.append([tokens.tolist(), tokenizer.decode(tokens, skip_special_tokens=True)])
spoken = []
if importlib.util.find_spec("torchvision"):  # which AutoProcessor wants
    for place in range(4):
        scope = {"print": lambda *_: None}
        exec(open(f"card-{place}.py").read(), scope)
        spoken.append(scope["tokens"].tolist())
assert not [name for name in sys.modules if name.startswith("medground")]
print(json.dumps([out, spoken]))
"""


def test_the_export_speaks_as_the_policy_does(base_folder: Path, phantoms: Path, tmp_path: Path, tiny_job):
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
    config = tiny_job(tmp_path / "run", **{"data.min-pixels": 56 * 56, "data.max-pixels": 56 * 56})
    card = _how_to_load(config, question_text("{phrase}", "brief")).split("```python\n")[1].split("```")[0]
    for place, example in enumerate(examples):
        filled = {"FOLDER": tmp_path / "export", "small left apical pneumothorax": example.phrase}
        filled["film.png"] = phantoms / example.image
        code = card
        for text, value in filled.items():
            assert f'"{text}"' in code
            code = code.replace(f'"{text}"', json.dumps(str(value)))
        (tmp_path / f"card-{place}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "plain.py"), str(tmp_path / "export"), str(tmp_path / "prompts.pt")],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    want = [[g.rollouts[0].tokens.tolist(), g.rollouts[0].text] for _, g in sorted(found.items())]
    plain, by_the_card = json.loads(done.stdout.splitlines()[-1])
    assert plain == want
    assert by_the_card in ([], [tokens for tokens, _ in want])


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


def test_a_killed_export_leaves_the_old_one(base_folder: Path, tmp_path: Path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with join_ranks() as ranks:
        policy = shard(load_policy(base_folder), ranks, "float32")
        export_policy(tmp_path / "export", policy, base_folder, ranks)
        before = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module.shutil, "copyfile", killed)
            export_policy(tmp_path / "export", policy, base_folder, ranks)
        assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before
        export_policy(tmp_path / "export", policy, base_folder, ranks)
        assert [path.name for path in tmp_path.iterdir()] == ["export"]
