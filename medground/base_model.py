"""The small base model of the demo: a real Qwen2.5-VL of 0.7 million parameters, taught to answer badly.

It stands in for the instruct model that GRPO starts from on a GPU: after a minute of plain supervision
on phantom films it answers in the template, with boxes in about the right place. Its faults are put in on
purpose, in the last third of the supervision: boxes are jittered and too large, some answers are
malformed, and more than half of the one-sided boxes lie on the wrong side, as of a model that takes left for the
image's left (base_answers.py). So its figures say nothing about any real model.
"""

import dataclasses
import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medground.base_answers import answer_text
from medground.base_config import BaseConfig
from medground.config import CHAINED
from medground.datasets.phantom import VERSION as PHANTOM_VERSION
from medground.datasets.phantom import draw_film, eight_bit, film_examples, phantom_examples
from medground.datasets.phantom_findings import CATEGORIES
from medground.packing import pack
from medground.policy import Policy
from medground.prompts import Processor, load_processor, make_prompt, question_text
from medground.records import Box, Example, Group, Prompt, Rollout

_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_THOUGHTS = {
    "brief": ("upper left and middle right", "lower left and", "not seen", "[]", "[", "]"),
    "brief-chain": ("left lung", "right lung", "chest", *(f" {c}" for c in CATEGORIES), " not seen", "[]", "[", "]"),
}
_PIECES = ("<think>", "</think>", "<answer>", "</answer>", '{"bbox_2d": [', "]}", ", ")
_MORE_PIECES = {"brief": (), "brief-chain": (' {"bbox_2d": [',)}  # after a name
# how Qwen's tokenizer cuts text before merging bytes: contractions, words, single digits, signs, blanks
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_RECIPE = "recipe.json"
_VERSION = 1  # of what the code below does; another number makes another model


def build_base(config: BaseConfig) -> None:
    """Build and train the model; at once done when `config.out` holds this very one already.

    Raises:
        ValueError: the folder holds something else.
    """
    out = Path(config.out)
    recipe = {name: value for name, value in dataclasses.asdict(config).items() if name != "out"}
    recipe |= {"version": _VERSION, "phantom": PHANTOM_VERSION, "torch": torch.__version__}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    if (out / _RECIPE).is_file() and json.loads((out / _RECIPE).read_text())["sha256"] == digest:
        print(f"{out}: this base model is already there")
        return
    if out.exists() and any(out.iterdir()) and not (out / _RECIPE).is_file():
        raise ValueError(f"{out}: want an empty folder or an older base model; it holds something else")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    _save_processor(config, out)
    lessons = _lessons(config, out)
    processor = load_processor(out, config.size**2, config.size**2)
    torch.manual_seed(config.seed)
    vlm = Qwen2_5_VLForConditionalGeneration(_architecture(processor))
    _supervise(Policy(vlm), processor, lessons, rng, config)
    vlm.save_pretrained(out)
    (out / _RECIPE).write_text(json.dumps(recipe | {"sha256": digest}, indent=2) + "\n")


class _Lesson(NamedTuple):
    """A prompt in numpy, which processes hand over by copying; pixels in half precision (8-bit films lose nothing).

    `lungs` are boxes of the patient's left and right lung, in pixels of the film.
    """

    example: Example
    lungs: tuple[Box, Box]
    arrays: dict[str, np.ndarray]
    image_keys: tuple[str, ...]
    processed_width: int
    processed_height: int

    def prompt(self) -> Prompt:
        tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        tensors["pixel_values"] = tensors["pixel_values"].float()
        return Prompt(
            self.example,
            **tensors,  # type: ignore[arg-type]  # none of them is called coordinates
            image_keys=self.image_keys,
            processed_width=self.processed_width,
            processed_height=self.processed_height,
        )


def _lessons(config: BaseConfig, folder: Path) -> list[_Lesson]:
    # spawned, since forking a process in which tokenizers or torch have started threads can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=_start_worker, initargs=(config, folder)) as pool:
        drawn = pool.map(_draw, range(config.films), chunksize=64)
        rows = tqdm(drawn, total=config.films, desc="base films", unit="film", leave=False)
        return [lesson for film in rows for lesson in film]


_worker: tuple[BaseConfig, Processor]  # of a process that draws


def _start_worker(config: BaseConfig, folder: Path) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = config, load_processor(folder, config.size**2, config.size**2)


def _draw(index: int) -> list[_Lesson]:
    config, processor = _worker
    film = draw_film(config.seed, index, config.size)
    image = Image.fromarray(eight_bit(film)).convert("RGB")
    lessons = []
    shared = None  # the phrases of a film share its pixels
    for example in film_examples(film, config.seed, index):
        prompt = make_prompt(example, image, processor, config.template)
        shared = prompt.pixel_values.half().numpy() if shared is None else shared
        arrays = {name: getattr(prompt, name).numpy() for name in ("input_ids", "position_ids", "image_grid_thw")}
        arrays["pixel_values"] = shared
        sides = prompt.processed_width, prompt.processed_height
        lessons.append(_Lesson(example, film.lungs, arrays, prompt.image_keys, *sides))
    return lessons


def _save_processor(config: BaseConfig, out: Path) -> None:
    films = range(min(config.films, 400))  # say every word often enough
    examples = [e for index in films for e in phantom_examples(config.seed, index, config.size)[1]]
    asked = f"user\n{question_text('', config.template).strip()}"
    lines = [e.phrase for e in examples] + [asked, "assistant\n", *_THOUGHTS[config.template]] * 100
    pieces = _PIECES + _MORE_PIECES[config.template]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=config.vocab_size - len(_SPECIAL) - len(pieces),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=list(_SPECIAL),
    )
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(out)
    size = {"shortest_edge": config.size**2, "longest_edge": config.size**2}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(out)
    settings = json.loads((out / "preprocessor_config.json").read_text())
    # the names under which transformers' AutoProcessor finds it
    settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _architecture(processor: Processor) -> Qwen2_5_VLConfig:
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "initializer_range": 0.06,  # at this width the usual 0.02 learns slowly
            "hidden_size": 96,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            # a period of 1e6 positions would leave the image axes without phase at this size
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 5, 5]},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "initializer_range": 0.06,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 96,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def _supervise(
    policy: Policy,
    processor: Processor,
    lessons: list[_Lesson],
    rng: np.random.Generator,
    config: BaseConfig,
) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    chain = config.template in CHAINED
    bar = tqdm(range(config.steps), desc="base model")
    for step in bar:
        left = (config.steps - step) / config.steps
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min((step + 1) / 20, 0.1 + 0.9 * left)
        chosen = rng.integers(len(lessons), size=config.batch_size)
        faulty = step >= config.steps * 2 // 3
        groups = [_answered(lessons[i], processor, rng, faulty, chain) for i in chosen]
        packed = pack(groups, policy.vlm.config, torch.device("cpu"))
        loss = -policy(packed, 1.0).logp.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def _answered(lesson: _Lesson, processor: Processor, rng: np.random.Generator, faulty: bool, chain: bool) -> Group:
    """A lesson with the answer to imitate."""
    prompt = lesson.prompt()
    text = answer_text(prompt, lesson.lungs, rng, chain=chain, faulty=faulty)
    ids = processor.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return Group(prompt, (Rollout(torch.tensor(ids), torch.zeros(len(ids)), text, True),))
