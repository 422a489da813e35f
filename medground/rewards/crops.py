"""Crops of predicted boxes, cut and resized on the device in one batched call, from the image that the model saw.

A crop is the square around the box: the box with `context` times its sides, its shorter side then made as long as the
longer one about the same centre, so that the aspect is kept. Where it leaves the image it is black. It is resized by a
triangle filter as wide as a pixel of the result (PIL's BILINEAR, torchvision's antialias): a product with a matrix
from the left for the rows, one for all crops of an image, and one from the right for the columns.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medground.records import Prompt

CHUNK = 64
"""Crops resized at once; what lies between the two products is channels x size x width numbers a crop."""
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OPENAI_CLIP_MEAN and _STD of Qwen's image processor
_STD = (0.26862954, 0.26130258, 0.27577711)


def images_of(prompts: Sequence[Prompt], device: torch.device | str, channels: int = 3, merge: int = 2) -> Tensor:
    """The first image of each prompt, put together again from its patches.

    Args:
        prompts: B of them; patches as Qwen2.5-VL's processor makes them: [gh gw merge merge, 3 time patch patch].
        device: where it is done.
        channels: the first so many; 1 is enough for grey images.
        merge: side of the blocks that patches lie in.

    Returns:
        [B, channels, height, width], float32 in 0..1, all as large as the largest, black below and to the right.
    """
    height, width = (max(getattr(p, f"processed_{side}") for p in prompts) for side in ("height", "width"))
    out = torch.zeros(len(prompts), channels, height, width, device=device)
    mean, std = (torch.tensor(v[:channels], device=device)[:, None, None] for v in (_MEAN, _STD))
    for picture, prompt in zip(out, prompts, strict=True):
        _, rows, columns = prompt.image_grid_thw[0].tolist()
        side = prompt.processed_height // rows
        frames = prompt.pixel_values.shape[1] // (3 * side**2)  # the picture is in each of them
        patches = prompt.pixel_values[: rows * columns].view(-1, 3, frames, side**2)
        pixels = patches[:, :channels, 0].to(device, torch.float32)
        blocks = pixels.view(rows // merge, columns // merge, merge, merge, channels, side, side)
        whole = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(channels, rows * side, columns * side)
        picture[:, : rows * side, : columns * side] = (whole * std + mean).clamp(0, 1)
    return out


def squares(boxes: Tensor, context: float) -> Tensor:
    """The squares around boxes [..., 4], xyxy, with their context."""
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    half = (boxes[..., 2:] - boxes[..., :2]).amax(-1, keepdim=True) * context / 2
    return torch.cat([centre - half, centre + half], -1)


def crops_of(images: Tensor, which: Tensor, regions: Tensor, size: int) -> Tensor:
    """Cut regions out of images and resize them.

    Args:
        images: [B, C, height, width], float32, on the device.
        which: [n], int64, on the CPU, the image of each region.
        regions: [n, 4], float32, xyxy in pixels of the image, of positive sides; may leave the image.
        size: sides of a crop.

    Returns:
        [n, C, size, size], float32, black outside the image.
    """
    C, height, width = images.shape[1:]
    out = torch.empty(len(regions), C, size, size, device=images.device)
    for own, places in _batches(which.tolist()):
        k, n = places.shape
        box = regions[places.flatten()].to(images.device)
        rows = _weights(box[:, 1], box[:, 3], size, height).view(k, 1, n * size, height)
        columns = _weights(box[:, 0], box[:, 2], size, width).view(k, 1, n, size, width)
        cut = (rows @ images[own]).view(k, C, n, size, width) @ columns.mT  # [k, C, n, size, size]
        out[places.flatten()] = cut.transpose(1, 2).reshape(k * n, C, size, size)
    return out


def _batches(which: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Images with equally many regions together: their numbers [k], and the places of their regions [k, n]."""
    of: dict[int, list[int]] = {}
    for place, image in enumerate(which):
        of.setdefault(image, []).append(place)
    by_count: dict[int, list[tuple[int, list[int]]]] = {}
    for image, places in of.items():
        for start in range(0, len(places), CHUNK):
            some = places[start : start + CHUNK]
            by_count.setdefault(len(some), []).append((image, some))
    for n, pieces in by_count.items():
        k = max(1, CHUNK // n)
        for start in range(0, len(pieces), k):
            images, places_of = zip(*pieces[start : start + k], strict=True)
            yield list(images), torch.tensor(places_of)


def _weights(start: Tensor, stop: Tensor, size: int, pixels: int) -> Tensor:
    """What each of `size` pixels of a crop from `start` to `stop` [n] takes of each pixel of a line: [n, size, pixels].

    Every row adds up to 1 over an endless line; pixels beyond the image are black and take their share.
    """
    scale = ((stop - start) / size)[:, None]
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale
    support = scale.clamp(min=1)[..., None]
    first = torch.floor(centre - support[..., 0])
    line = torch.arange(pixels, device=start.device) + 0.5
    weights = (1 - (line - centre[..., None]).abs() / support).clamp(min=0)
    # the sum over the endless line, of a triangle sampled once a pixel
    reach = int(torch.ceil(support.max()).item()) if support.numel() else 1
    near = first[..., None] + torch.arange(2 * reach + 2, device=start.device) + 0.5
    total = (1 - (near - centre[..., None]).abs() / support).clamp(min=0).sum(-1, keepdim=True)
    return weights / total
