"""Model cards: what the run wrote, in a form that the hub reads, whatever texts came in, and without this machine."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from made_up_run import HOSTILE, finish_run, start_run

from medground.config import load_config, save_config
from medground.model_card import base_of, write_cards
from medground.prompts import TEMPLATES, question_text

markdown_it = pytest.importorskip("markdown_it")


def finished(folder: Path, **changes) -> Path:
    """A finished run of four steps with an export and adapters; `changes` in its model's configuration."""
    run, data = start_run(folder)
    finish_run(run)
    config = load_config(run / "config.json")
    config = dataclasses.replace(
        config,
        out=str(run),
        model=dataclasses.replace(
            config.model, **{"path": str(folder / "models" / HOSTILE.replace("/", "")), **changes}
        ),
        data=dataclasses.replace(config.data, path=(str(data), str(folder / "b`a``d|name"))),
        reward=dataclasses.replace(config.reward, encoder=f"phantom:{folder}/encoders/mine"),
    )
    save_config(config, run / "config.json")
    facts = json.loads((run / "environment.json").read_text())
    facts |= {
        "command": f"{folder}/medground/train.py demo", "data_sha256": "ab" * 32, "model": config.model.path,
        "packages": {"medground": "0.1.0", "torch": HOSTILE}, "records": {"train": 345, "curve": 4, "test": 12},
        "manifests_sha256": {"data": "cd" * 32},
    }  # fmt: skip
    (run / "environment.json").write_text(json.dumps(facts))
    summary = {"steps": 4, "records_test": 12, "miou_blind_baseline": 0.3456, "machine": HOSTILE, "ranks": 2}
    (run / "summary.json").write_text(json.dumps(summary | {"miou_blind_baseline_interval": [0.3111, 0.3777]}))
    (run / "export" / "adapter").mkdir(parents=True)
    (run / "export" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return run


def base_card(folder: Path, front: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n# A base\n")
    return folder


def parts(card: Path) -> tuple[dict, str]:
    """Front matter and the rest."""
    _, front, body = card.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    run = finished(folder)
    base = base_card(folder / "base", "license: apache-2.0\nlanguage: en")
    write_cards(run, base, question_text("{phrase}", "chain-of-box"))
    return folder, run / "export" / "README.md", run / "export" / "adapter" / "README.md"


def test_the_front_matter_is_what_the_hub_wants(cards):
    _, card, adapter = cards
    front, _ = parts(card)
    assert front["license"] == "apache-2.0" and front["pipeline_tag"] == "image-text-to-text"
    assert front["library_name"] == "transformers" and {"medground", "qwen2_5_vl"} <= set(front["tags"])
    assert "base_model" not in front  # a folder's name means nothing on the hub
    front, _ = parts(adapter)
    assert front["library_name"] == "peft" and "lora" in front["tags"]


def test_results_and_controls_are_there(cards):
    _, card, _ = cards
    _, body = parts(card)
    for text in (
        "| mean IoU | 9 | 0.123 (0.023 to 0.223) | 0.568 (0.468 to 0.668) | 0.234 (0.134 to 0.335) |",
        "| absent, and said so | 0 | none | none | none |", "mean IoU 0.346 (0.311 to 0.378).",
        "ab" * 32, "cd" * 32, "| 345 |", "Not for diagnosis", "`loss.loss_type`", "vllm serve FOLDER",
        "medground predict IMAGE",
    ):  # fmt: skip
        assert text in body, text


def test_nothing_of_this_machine_is_in_a_card(cards):
    folder, *found = cards
    for card in found:
        text = card.read_text()
        assert str(folder) not in text and "/tmp" not in text and str(Path.home()) + "/" not in text
        assert "`reward.encoder` | `mine`" in text


def test_hostile_texts_mean_nothing(cards):
    for card in cards[1:]:
        _, body = parts(card)
        tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(body)
        inline = [child for token in tokens for child in token.children or ()]
        html = [token.content.strip() for token in [*tokens, *inline] if token.type.startswith("html_")]
        assert html == ["<details><summary>Options</summary>", "</details>"]
        assert not [child for child in inline if child.type in ("link_open", "image")]
        rows = [token for token in tokens if token.type == "tr_open"]
        cells = [token for token in tokens if token.type in ("td_open", "th_open")]
        # two columns or five: no text opened a cell
        results = 5 * (1 + 9)
        assert (len(cells) - results) == 2 * (len(rows) - 10)
        code = [child.content for child in inline if child.type == "code_inline"]
        assert "b`a``d|name" in code and any("alert(1)" in text for text in code)


def test_a_model_of_the_hub_is_named(tmp_path: Path):
    run = finished(tmp_path, path="Qwen/Qwen2.5-VL-3B-Instruct")
    front = "license: other\nlicense_name: qwen-research\nlicense_link: https://example.test/LICENSE"
    write_cards(run, base_card(tmp_path / "hub", front), "Find: {phrase}")
    for card, relation in (("README.md", "finetune"), ("adapter/README.md", "adapter")):
        front, body = parts(run / "export" / card)
        assert (front["base_model"], front["base_model_relation"]) == ("Qwen/Qwen2.5-VL-3B-Instruct", relation)
        assert (front["license"], front["license_name"]) == ("other", "qwen-research")
        assert front["license_link"] == "https://example.test/LICENSE"
        assert "`Qwen/Qwen2.5-VL-3B-Instruct`" in body
    assert 'from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct"' in body


@pytest.mark.parametrize(
    ("front", "license"),
    [
        ("license: mit", "mit"),
        ("license: Apache-2.0", "apache-2.0"),
        ("language: en", "other"),
        ("license: [mit, other]", "other"),
        ("license: 'mit\n\n  base_model: x'", "other"),
        ("license: {a: b", "other"),
        ("- mit", "other"),
    ],
)
def test_the_licence_is_the_bases(front: str, license: str, tmp_path: Path):
    assert base_of("a/b", base_card(tmp_path, front)).license == license


def test_a_configuration_may_tell_the_licence(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    found = base_of(str(tmp_path), tmp_path)
    assert (found.license, found.name, found.shown) == ("mit", "", tmp_path.name)
    (tmp_path / "config.json").write_text("{}")
    assert base_of(str(tmp_path), tmp_path).license == "other"


def test_a_run_without_a_true_box_has_a_card(tmp_path: Path):
    run = finished(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    none = {"miou_blind_baseline": None, "miou_blind_baseline_interval": [None, None]}
    (run / "summary.json").write_text(json.dumps(summary | none))
    write_cards(run, base_card(tmp_path / "base", "license: mit"), "Find: {phrase}")
    assert "which sees no image: mean IoU none." in (run / "export" / "README.md").read_text()


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_code_asks_as_training_did(template: str, tmp_path: Path):
    run = finished(tmp_path)
    write_cards(run, base_card(tmp_path / "base", "license: mit"), question_text("{phrase}", template))
    code = (run / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    line = next(line for line in code.splitlines() if line.startswith("question = "))
    scope = {"phrase": "a {nodule} 'left'"}
    exec(line, scope)
    assert scope["question"] == question_text("a {nodule} 'left'", template)
    compile(code, "card", "exec")


def test_an_unfinished_run_is_named(tmp_path: Path):
    run = finished(tmp_path)
    (run / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"summary\.json: want a file of a finished run"):
        write_cards(run, base_card(tmp_path / "base", "license: mit"), "Find: {phrase}")
