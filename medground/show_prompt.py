"""`medground prompt`: what the model is asked, word for word."""

from dataclasses import dataclass
from pathlib import Path

from medground.config import Template
from medground.records import Example


@dataclass(frozen=True, kw_only=True)
class ShowPromptConfig:
    """Print what the model is asked."""

    template: Template = "patient-side"
    """Wording of the question."""
    phrase: str = "small left apical pneumothorax"
    """Phrase that is asked about."""
    image: str = ""
    """Image file; with a model, its tokens and its size as the model sees it are told."""
    model: str = ""
    """Model folder; with one, the whole chat is printed, special tokens and all."""
    min_pixels: int = 56 * 56
    """As data.min_pixels of a run."""
    max_pixels: int = 1280 * 28 * 28
    """As data.max_pixels of a run."""


def show_prompt(config: ShowPromptConfig) -> None:
    """Print it.

    Raises:
        ValueError: the image or the model folder cannot be used, or an image is given without a model.
    """
    from medground.prompts import FAMILIES, question_text  # a second to import, for which --help need not wait

    if not config.model:
        if config.image:
            raise ValueError("model: want a model folder with --image, since its processor sizes the image; got none")
        print(question_text(config.phrase, config.template))
        print("\nbefore it: the image. What its family speaks:")
        print("\n".join(f"  {name:16}{spoken}" for name, spoken in FAMILIES.items()))
        return
    if not 0 < config.min_pixels <= config.max_pixels:
        raise ValueError(f"min_pixels: want 0 < min_pixels <= max_pixels; got {config.min_pixels}")
    if not Path(config.model).is_dir():
        raise ValueError(f"{config.model}: want a model folder; there is none")
    print(_chat(config))


def _chat(config: ShowPromptConfig) -> str:
    from PIL import Image

    from medground.datasets.images import read_image
    from medground.prompts import IMAGE_TOKEN, load_processor, make_prompt, spoken_size

    processor = load_processor(Path(config.model), config.min_pixels, config.max_pixels)
    picture = read_image(config.image) if config.image else Image.new("RGB", (640, 640))
    width, height = picture.size
    example = Example("prompt", config.image, width, height, config.phrase, (), "", "", "", "", "")
    prompt = make_prompt(example, picture, processor, config.template)
    text = processor.tokenizer.decode(prompt.input_ids)
    images = text.count(IMAGE_TOKEN)
    text = text.replace(IMAGE_TOKEN * images, f"{IMAGE_TOKEN} * {images}")
    right, lower = spoken_size(prompt)
    shown = config.image or "an image of the size"
    return (
        f"{text}\n\n{len(prompt.input_ids)} tokens, {images} of them the image.\n{shown} {width} x {height} is seen as "
        f"{prompt.processed_width} x {prompt.processed_height}; the model speaks {prompt.coordinates}: "
        f"the whole image is [0, 0, {right}, {lower}]."
    )
