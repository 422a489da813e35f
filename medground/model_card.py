"""README.md of an export and of its adapters: a Hugging Face model card, from what the run has written.

It names no path of the machine: of data and model folders the last part of their names alone. Texts that come from
users stand in code spans, where neither markdown nor HTML means anything; the front matter is written as YAML by
huggingface_hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from medground.config import Config, load_config

CARD = "README.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*", re.ASCII)
_METRICS = {
    "miou": "mean IoU",
    "acc@0.3": "IoU above 0.3",
    "acc@0.5": "IoU above 0.5",
    "acc@0.7": "IoU above 0.7",
    "centre_hit": "centre hit",
    "side": "correct side",
    "absent": "absent, and said so",
    "false_empty": "wrongly empty (lower is better)",
    "parse_failures": "unreadable answers (lower is better)",
}
_SECTIONS = ("prompt", "rollout", "reward", "loss", "optimizer")
_PRIVATE = ("reward.encoder", "reward.custom")  # may be paths: of these the last part


_LIMITS = """\
Research on grounding. **Not for diagnosis, and not a medical device.** The numbers below hold for data like the test
records: other hospitals, devices, age groups, findings and wordings were not tried. A box may be wrong or on the wrong
side, and the words before it are no explanation of it. Left and right in a phrase are the patient's, whose left is
taken to be on the image's right, as on a frontal film: of a film that is mirrored the model cannot know."""


@dataclass(frozen=True)
class Base:
    """The model that training began from.

    Attributes:
        name: on the hub; "" for a folder, whose name means nothing elsewhere.
        shown: what to call it.
        license: an identifier of the hub's, or other.
        license_name: of a licence that is other.
        license_link: where that one is to be read.
    """

    name: str
    shown: str
    license: str
    license_name: str | None = None
    license_link: str | None = None


def write_cards(run: Path, model_folder: Path, question: str) -> None:
    """Write the card of a run's export, and of its adapters if it has any.

    Args:
        run: its folder, finished: config.json, environment.json, summary.json, eval/ and export/.
        model_folder: that it began from; its own card and configuration may tell the licence.
        question: what the user says after the image, {phrase} in the phrase's place.

    Raises:
        ValueError: a file of the run is missing or damaged.
    """
    config, facts = load_config(run / "config.json"), _json(run / "environment.json")
    base = base_of(config.model.path, model_folder)
    body = _body(run, config, facts, _json(run / "summary.json"), base)
    export, adapter = run / "export", run / "export" / "adapter"
    model_type = _json(export / "config.json").get("model_type", "")
    tags = ["medground", "grpo", "visual-grounding", "medical-imaging", str(model_type)]
    loading = _how_to_load(config, question)
    _write(export / CARD, _front(base, "transformers", tags, "finetune") + body + loading)
    if adapter.is_dir():
        tags = ["lora", *tags]
        _write(adapter / CARD, _front(base, "peft", tags, "adapter") + body + _how_to_add(base, loading))


def base_of(path: str, model_folder: Path) -> Base:
    """What is known of a base model.

    Args:
        path: `model.path` of the run.
        model_folder: where its files are.
    """
    on_hub = not Path(path).is_dir() and bool(_HUB_NAME.fullmatch(path))
    told: dict[str, Any] = {}
    try:
        told = metadata_load(model_folder / CARD) or {}
    except Exception:  # a card that cannot be read says nothing of a licence
        told = {}
    if not isinstance(told, dict) or "license" not in told:
        found = _json(model_folder / "config.json").get("license")
        told = {"license": found} if found else {}
    license_id = str(told.get("license", "other")).strip().lower()
    if not _LICENSE.fullmatch(license_id):
        license_id = "other"
    more = {name: told.get(name) if license_id == "other" else None for name in ("license_name", "license_link")}
    more = {name: value if isinstance(value, str) and "\n" not in value else None for name, value in more.items()}
    if more["license_link"] and not more["license_link"].startswith("https://"):
        more["license_link"] = None  # of a file beside that card, which is not beside this one
    shown = path if on_hub else Path(path).name or "a local folder"
    return Base(path if on_hub else "", shown, license_id, more["license_name"], more["license_link"])


def _front(base: Base, library: str, tags: list[str], relation: str) -> str:
    data = ModelCardData(
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        base_model=base.name or None,
        base_model_relation=relation if base.name else None,
        pipeline_tag="image-text-to-text",
        library_name=library,
        tags=[tag for tag in tags if tag],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _body(run: Path, config: Config, facts: dict[str, Any], summary: dict[str, Any], base: Base) -> str:
    data = ", ".join(_code(Path(folder).name or "data") for folder in config.data.path)
    version = _code(facts.get("packages", {}).get("medground"))
    said = (
        f"{_code(base.shown)}, trained by GRPO with MedGround {version} to draw the box that a phrase of a medical "
        "report speaks of. Its boxes are in the pixels of the image as its processor resized it."
    )
    terms = "The licence is that of the base model"
    if base.license == "other":
        terms = "The licence of the base model could not be told from its files, or has no identifier: see there"
    return "\n\n".join(
        [
            "# A medical grounding model",
            said + f" {terms}; the data may bring terms of its own.",
            "## Intended use and limits",
            _LIMITS,
            "## Data",
            _data(data, config, facts, summary),
            "## Results",
            _results(run, summary),
            "## Training",
            _training(config, facts, summary),
        ]
    )


def _data(data: str, config: Config, facts: dict[str, Any], summary: dict[str, Any]) -> str:
    counts = facts.get("records", {})
    rows = [("data folders", data), ("SHA-256 of the records", _code(facts.get("data_sha256")))]
    for name, digest in facts.get("manifests_sha256", {}).items():
        rows.append((f"SHA-256 of the manifest of {_code(name)}", _code(digest)))
    if "train" in counts:
        rows.append((f"records of split {_code(config.data.train_split)}, trained on", str(counts["train"])))
    rows.append((f"records of split {_code(config.data.test_split)}, in the results", str(summary["records_test"])))
    return _table(("", ""), rows)


def _results(run: Path, summary: dict[str, Any]) -> str:
    last = f"step-{summary['steps']:06d}"
    names = ("step-000000", last, f"{last}.shuffled")
    before, after, shuffled = (_json(run / "eval" / f"{name}.json")["metrics"] for name in names)
    rows = []
    for name in after:
        cells = [_estimate(found.get(name)) for found in (before, after, shuffled)]
        n = after[name].get("n")
        rows.append((_METRICS.get(name, _code(name)), str(n), *cells))
    low, high = summary["miou_blind_baseline_interval"]
    blind = _estimate({"value": summary["miou_blind_baseline"], "low": low, "high": high})
    return (
        "Greedy answers; 95 % intervals by bootstrap over patients. *Shuffled*: the trained model is shown another "
        "patient's image with each phrase; what it scores there, it scores without looking.\n\n"
        + _table(("", "n", "before", "after", "after, shuffled"), rows)
        + f"\n\nThe best constant box for each phrase, which sees no image: mean IoU {blind}."
    )


def _training(config: Config, facts: dict[str, Any], summary: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items())
    rows = [
        ("machine", _code(f"{summary.get('machine')}, {summary.get('ranks')} processes")),
        ("steps", str(summary["steps"])),
        ("seed", str(config.seed)),
        ("commit of MedGround", _code(facts.get("commit"))),
        ("packages", _code(packages)),
        ("precision", _code(config.model.precision)),
        ("adapters", _code(json.dumps(asdict(config.model.lora))) if config.model.lora.rank else "none"),
        ("pixels of an image", f"{config.data.min_pixels} to {config.data.max_pixels}"),
        ("augmentation", _code(json.dumps(asdict(config.data.augment)))),
    ]
    every = asdict(config)
    options = []
    for section in _SECTIONS:
        for name, value in every[section].items():
            full = f"{section}.{name}"
            shown = re.split(r"[/\\]", str(value))[-1] if full in _PRIVATE else json.dumps(value)
            options.append((_code(full), _code(shown)))
    details = f"<details><summary>Options</summary>\n\n{_table(('option', 'value'), options)}\n\n</details>"
    return f"{_table(('', ''), rows)}\n\n{details}"


def _how_to_load(config: Config, question: str) -> str:
    low, high, most = config.data.min_pixels, config.data.max_pixels, config.rollout.max_new_tokens
    return _LOADING.format(question=json.dumps(question), low=low, high=high, most=most)


def _how_to_add(base: Base, loading: str) -> str:
    name = base.name or "BASE_MODEL_FOLDER"
    return f"""

## How to load

These are the adapters alone; the folder above has them merged into the model.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained({json.dumps(name)}, dtype="auto")
model = PeftModel.from_pretrained(model, ADAPTER_FOLDER)
```
{loading.replace("## How to load", "## How to ask the merged model")}"""


_LOADING = """

## How to load

`medground predict IMAGE "small left apical pneumothorax" --model FOLDER` asks as in training, reads DICOM and gives
boxes in the pixels of the image file. With transformers (and torchvision, which its processor wants):

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, phrase = "FOLDER", "small left apical pneumothorax"
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder, min_pixels={low}, max_pixels={high})
image = Image.open("film.png").convert("RGB")
question = {question}.replace("{{phrase}}", phrase)
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": question}}]}}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, max_new_tokens={most}, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(processor.tokenizer.decode(tokens, skip_special_tokens=True))

# a box is in pixels of the resized image: times these it is in pixels of the file
height, width = (processor.image_processor.patch_size * int(n) for n in inputs["image_grid_thw"][0, 1:])
print("scale x, y:", image.width / width, image.height / height)
```

With vLLM (not tried with this model):

```
vllm serve FOLDER --limit-mm-per-prompt '{{"image": 1}}' \\
  --mm-processor-kwargs '{{"min_pixels": {low}, "max_pixels": {high}}}'
```
"""


def _estimate(found: dict[str, Any] | None) -> str:
    if not found or found.get("value") is None:
        return "none"
    low, high = found.get("low"), found.get("high")
    span = f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
    return f"{found['value']:.3f}{span}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(value: object) -> str:
    """A code span that any text may stand in, in a table as well."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", str(value)).strip() or "none"
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    inside = f" {text} " if text[0] == "`" or text[-1] == "`" else text
    return f"{fence}{inside}{fence}".replace("|", "\\|")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: want a file of a finished run; got: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: want a JSON object; got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: want a JSON object; got {type(value).__name__}")
    return value


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
