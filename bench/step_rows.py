"""What trainers of rows have in common: `generate` on G copies of each prompt, with answers of the job's lengths."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin

from bench.step_job import Job
from medground.prompts import IMAGE_TOKEN, load_processor

END = "<|im_end|>"  # ours, which never draws a token that ends, is cut off at its limit


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without the part for videos, which insists on torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = IMAGE_TOKEN, "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_row_processor(job: Job) -> ImageProcessor:
    """The job's processor as transformers has it; answers end with a token of the vocabulary."""
    ours = load_processor(job.model, job.pixels, job.pixels)
    ours.tokenizer.eos_token = END
    return ImageProcessor(ours.images, ours.tokenizer, chat_template=ours.tokenizer.chat_template)


class ExactLengths(LogitsProcessor):
    """Ends each row at its length and not before, and never draws a token of an image, as ours does not.

    `on_first` is called when the prompts have been run, before the first token is drawn.
    """

    def __init__(self, lengths: Sequence[int], end: int, never: Sequence[int], on_first: Callable[[], None]):
        self._lengths = torch.tensor(lengths)
        self._end, self._never, self._on_first = end, torch.tensor([*never, end]), on_first
        self._drawn = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._drawn:
            self._on_first()
            self._lengths, self._never = self._lengths.to(scores.device), self._never.to(scores.device)
        self._drawn += 1
        scores = scores.index_fill(1, self._never, -torch.inf)
        ends = torch.full_like(scores[:1], -torch.inf)
        ends[:, self._end] = 0.0
        return torch.where((self._lengths == self._drawn)[:, None], ends, scores)


def exact_lengths(
    job: Job, step: int, end: int, config: Qwen2_5_VLConfig, on_first: Callable[[], None], groups: slice = slice(None)
) -> LogitsProcessorList:
    """For `generate` on the rows of these of the step's prompts, G after G."""
    lengths = [length for row in job.lengths(step)[groups] for length in row]
    never = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    return LogitsProcessorList([ExactLengths(lengths, end, never, on_first)])
