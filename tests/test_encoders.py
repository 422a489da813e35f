"""Encoders from local folders: MedCLIP's published layout, transformers, open_clip, phantom; what is missing."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
)

from medground.cli import main
from medground.encoder_tools import area_under_curve
from medground.rewards.encoders import load_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "left", "right", "small", "nodule", "##s", "Effusion"]
VISION = {"image_size": 56, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 7}
TEXT = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 16, "max_position_embeddings": 80}


@pytest.fixture(scope="module")
def medclip(tmp_path_factory):
    """A folder in exactly the published layout, small and of random weights; and its two towers."""
    folder = tmp_path_factory.mktemp("medclip")
    torch.manual_seed(0)
    swin, bert = SwinModel(SwinConfig(**VISION)).eval(), BertModel(BertConfig(**TEXT)).eval()
    weights = {"logit_scale": torch.tensor(4.0)}
    for name, value in swin.state_dict().items():
        for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
            name = name.replace(f"attention.{letter}_proj", f"attention.self.{word}")
        name = name.replace("attention.o_proj", "attention.output.dense")
        name = name.replace("attention.relative_position_bias.rel", "attention.self.rel")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        weights["vision_model.model." + name] = value
    weights["vision_model.model.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(49, 49)
    weights |= {"text_model.model." + name: value for name, value in bert.state_dict().items()}
    weights["text_model.model.embeddings.position_ids"] = torch.arange(80)[None]
    weights["vision_model.projection_head.weight"] = torch.randn(6, 24)
    weights["text_model.projection_head.weight"] = torch.randn(6, 16)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "vision.json").write_text(json.dumps(VISION))
    (folder / "text.json").write_text(json.dumps(TEXT))
    return folder, weights, swin, bert


def test_medclip_gives_the_published_forward(medclip):
    folder, weights, swin, bert = medclip
    encoder = load_encoder(f"medclip:{folder}")
    assert encoder.size == 56 and encoder.scale == pytest.approx(54.598, rel=1e-4)
    crops = torch.rand(3, 3, 56, 56)
    pixels = (crops - 0.5862785803043838) / 0.27950088968644304
    with torch.no_grad():
        want = normalize(swin(pixels).pooler_output @ weights["vision_model.projection_head.weight"].T, dim=-1)
        torch.testing.assert_close(encoder.images(crops), want, atol=1e-5, rtol=0)
        texts = ["left nodules", "small right Effusion", "left"]
        ids = [[2, 5, 8, 9, 3], [2, 7, 6, 10, 3], [2, 5, 3]]
        for row, tokens in zip(encoder.texts(texts), ids, strict=True):
            states = bert(torch.tensor([tokens]), output_hidden_states=True).hidden_states
            mean = torch.stack([states[1], states[2], states[-1]])[:, 0].mean((0, 1))
            alone = normalize(weights["text_model.projection_head.weight"] @ mean, dim=-1)
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)


def test_medclip_weights_that_do_not_fit_are_named(medclip, tmp_path):
    folder, weights, _, _ = medclip
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, value, wanted in [
        ("text_model.projection_head.weight", torch.randn(6, 15), r"want \(6, 16\); got \(6, 15\)"),
        ("vision_model.model.more", torch.zeros(1), r"more: want nothing; got \(1,\)"),
    ]:
        torch.save(weights | {name: value}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=wanted):
            load_encoder(f"medclip:{tmp_path}")
    short = {name: value for name, value in weights.items() if not name.endswith("fc1.bias") and "pooler.d" not in name}
    torch.save(short, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"text_model.model.pooler.dense.weight: want .*; got nothing"):
        load_encoder(f"medclip:{tmp_path}")


def tokenizer(folder, **special):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    rows = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(WordLevel(rows, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", **special).save_pretrained(folder)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_transformers_encoders_from_a_folder(family, tmp_path):
    torch.manual_seed(0)
    sides = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = sides | {"image_size": 16, "patch_size": 8}
    text = sides | {"vocab_size": len(WORDS), "max_position_embeddings": 6, "eos_token_id": 3, "projection_size": 16}
    config, model = (CLIPConfig, CLIPModel) if family == "clip" else (SiglipConfig, SiglipModel)
    made = model(config(text_config=text, vision_config=vision, projection_dim=16)).eval()
    made.save_pretrained(tmp_path)
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    encoder = load_encoder(f"transformers:{tmp_path}")
    assert encoder.size == 16
    crops = torch.rand(2, 3, 16, 16)
    pixels = (crops - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    ids = torch.tensor([[5, 8], [7, 6]])
    padded = torch.nn.functional.pad(ids, (0, 4)) if family == "siglip" else ids
    with torch.no_grad():
        both = made(input_ids=padded, pixel_values=pixels)
    torch.testing.assert_close(encoder.images(crops), both.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.texts(["left nodule", "small right"]), both.text_embeds, atol=1e-5, rtol=0)


def test_open_clip_is_asked_for_the_folder(tmp_path, monkeypatch):
    """With a stand-in for open_clip: that it is called as its documentation says."""
    calls = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Module()
            self.visual.image_mean, self.visual.image_std, self.visual.image_size = (0.5,) * 3, (0.5,) * 3, (4, 4)
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

        def encode_image(self, pixels):
            return pixels.mean((2, 3))

        def encode_text(self, tokens):
            return tokens.float()

    stand_in = type(sys)("open_clip")
    stand_in.create_model = lambda name, device: calls.append(name) or Model()
    stand_in.get_tokenizer = lambda name: (
        calls.append(name) or (lambda texts: torch.tensor([[len(t), 1] for t in texts]))
    )
    monkeypatch.setitem(sys.modules, "open_clip", stand_in)
    with pytest.raises(ValueError, match=r"open_clip_config.json; there is none"):
        load_encoder(f"open_clip:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text("{}")
    encoder = load_encoder(f"open_clip:{tmp_path}")
    assert calls == [f"local-dir:{tmp_path}"] * 2 and encoder.size == 4
    assert encoder.images(torch.ones(2, 3, 4, 4)).tolist() == normalize(torch.ones(2, 3), dim=-1).tolist()
    torch.testing.assert_close(encoder.texts(["abc"]), normalize(torch.tensor([[3.0, 1.0]]), dim=-1))
    load_encoder("open_clip:some/where")
    assert calls[2:] == ["hf-hub:some/where"] * 2


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("biomedclip", "want open_clip:PLACE, transformers:PLACE, medclip:PLACE, phantom:PLACE; got 'biomedclip'"),
        ("phantom:", "got 'phantom:'"),
        ("medclip:no/such", "want no/such/pytorch_model.bin; there is none. Unpack https://.*Bio_ClinicalBERT"),
        ("phantom:no/such", "medground encoders build"),
        ("transformers:no/such", "transformers:no/such cannot be loaded"),
    ],
)
def test_missing_encoders_say_how_to_get_them(name, wanted):
    with pytest.raises(ValueError, match=f"reward.encoder: .*{wanted}"):
        load_encoder(name)


def test_without_open_clip_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"open_clip is not installed: pip install"):
        load_encoder("open_clip:some/where")


def test_area_under_curve():
    assert area_under_curve(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0])) == 1
    assert area_under_curve(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])) == 0.75


def test_the_phantom_encoder_is_built_and_checked(phantoms: Path, tmp_path, capsys):
    out = tmp_path / "encoder"
    words = ["encoders", "build", "--data", str(phantoms), "--out", str(out), "--steps", "40"]
    assert main(words) == 0 and main(words) == 2
    assert "want a new or empty folder" in capsys.readouterr().err
    assert main(["encoders", "check", f"phantom:{out}", "--data", str(phantoms), "--split", "train"]) == 0
    said = capsys.readouterr().out
    aucs = [float(line.split()[-1]) for line in said.splitlines() if "AUC" in line]
    assert min(aucs) > 0.7, said  # on what it learnt from
    assert main(["encoders", "check"]) == 2 and main(["encoders", "check", "phantom:x", "--data", str(tmp_path)]) == 2
