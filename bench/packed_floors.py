"""How near decoding and prefill come to what the device allows: reading the weights once, multiplying by them once.

Rates are measured on the same device: of a copy, read and write counted, and of one large matrix product.
"""

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import timing
from bench.packed_sides import Case, make_engine, our_rollout


class Weights(NamedTuple):
    """Elements that a token of the stream, an image patch and a scored token are multiplied by."""

    layers: int
    vision: int
    head: int

    def operations(self, tokens: int, patches: int, scored: int) -> float:
        """Of a forward pass, attention not counted."""
        return 2.0 * (self.layers * tokens + self.vision * patches + self.head * scored)


def weights_of(case: Case) -> Weights:
    layers, vision = (
        sum(weight.numel() for weight in part.parameters())
        for part in (case.vlm.model.language_model.layers, case.vlm.model.visual)
    )
    return Weights(layers, vision, case.vlm.lm_head.weight.numel())


def operations_bound(case: Case, image_once: bool) -> float:
    """Operations of G groups of one completion over those of the packed group."""
    (P, _, G, C), patches, weights = case.size, case.size.patches, weights_of(case)
    alone = weights.operations(G * (P + C), patches * (1 if image_once else G), G * C)
    return alone / weights.operations(P + G * C, patches, G * C)


def copy_rate(device: torch.device) -> float:
    """Bytes a second."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / _seconds(lambda: torch.mm(a, b, out=out))


def _seconds(call: Callable[[], object], calls: int = 10) -> float:
    turn = timing.Turn(call)
    timing.timed(turn)
    return median(timing.timed(turn) for _ in range(calls))


def measure_floors(case: Case, rounds: int) -> dict[str, Any]:
    """Decode and prefill the first prompt and all of them, G rows each, images included.

    Returns:
        `copy_rate` in bytes and `product_rate` in operations a second; `decoding`: seconds of a step, and of reading
        the language model's weights once, the head's included; `prefill`: seconds, and those of the bare products.
    """
    weights, dtype = weights_of(case), case.vlm.dtype
    bytes_rate, rate = copy_rate(case.device), product_rate(case.device, dtype)
    reading = (weights.layers + weights.head) * dtype.itemsize / bytes_rate
    decoding, prefill = [], []
    for prompts in (1, len(case.prompts)):
        engine = make_engine(case, prompts)
        steps, fills = [], []
        for turn in range(rounds + 1):
            our_rollout(case, engine, prompts)
            if turn:  # the first records CUDA graphs
                steps.append(engine.stats.decode_seconds / engine.stats.steps)
                fills.append(engine.stats.prefill_seconds)
        needed = weights.operations(prompts * case.size.P, prompts * case.size.patches, prompts)
        decoding.append({"rows": prompts * case.size.G, "seconds": median(steps), "floor": reading})
        prefill.append({"prompts": prompts, "seconds": median(fills), "floor": needed / rate})
    return {"copy_rate": bytes_rate, "product_rate": rate, "decoding": decoding, "prefill": prefill}
