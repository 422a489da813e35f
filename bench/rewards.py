"""A step's rewards, semantic one included, beside the ways that peers compute them; on phantom films.

    python -m bench.rewards                 64 prompts of 8 completions
    python -m bench.rewards --run FOLDER    and what share that is of the steps of a run

    ours        parse, format, soft IoU and contrast of all completions: `read_answer` and the run's `Scorer`
    peers' way  as MedGround-R1's code is written: the encoder read from its files at every call, a call for each group,
                one crop and one phrase at a time; IoU of one pair of boxes at a time, in Python. Crops are cut by PIL;
                cosine alone, which is less work than contrast.

Both score the same completions, the audit's honest ones, and must agree on the IoU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medground.audit.cheats import Case, fair
from medground.audit.rewards import drawn, prompts_of
from medground.config import RewardConfig
from medground.datasets.images import read_image
from medground.datasets.manifest import load_records
from medground.datasets.phantom import PhantomConfig, write_phantom
from medground.encoder_tools import BuildConfig, build_encoder
from medground.evaluate import read_answer
from medground.prompts import Processor
from medground.records import Answer, Box, Example, Group, Rollout
from medground.rewards.encoders import load_encoder
from medground.rewards.spatial import answer_iou
from medground.rewards.total import Scorer
from medground.scoring import blind_answers

PROMPTS, G, REPEATS = 64, 8, 5
CONTEXT = 1.2


def step_groups(data: Path, prompts: int, train: Sequence[Example]) -> list[Group]:
    """Groups of completions of the audit's fair policy, with the images that the reward looks at."""
    chosen = drawn([example for example in train if example.boxes], prompts, 0)
    processor = Processor(None, Qwen2VLImageProcessorPil())  # type: ignore[arg-type]  # nothing is tokenised
    asked = list(prompts_of(chosen, (str(data),), processor, None, seeing=True))
    groups = []
    for i, (prompt, prior) in enumerate(zip(asked, blind_answers(train, chosen), strict=True)):
        case = Case(prompt, "brief", prior, np.random.default_rng([0, i]))
        none = torch.zeros(20)
        groups.append(Group(prompt, tuple(Rollout(none.long(), none, fair(case), True) for _ in range(G))))
    return groups


def ours(groups: Sequence[Group], scorer: Scorer) -> torch.Tensor:
    """Total rewards [B, G]."""
    return scorer(groups, _read(groups)).total


def peers(groups: Sequence[Group], encoder: str, films: Sequence[Image.Image]) -> torch.Tensor:
    """The same but for cosine in place of contrast: [B, G]."""
    totals = []
    for group, film in zip(groups, films, strict=True):
        model = load_encoder(encoder)
        for rollout in group.rollouts:
            answer = read_answer(rollout.text, group.prompt)
            boxes = answer.boxes or ()
            iou = max((pair_iou(box, truth) for box in boxes for truth in group.prompt.example.boxes), default=0.0)
            cosine = 0.0
            for x1, y1, x2, y2 in boxes[:1]:
                half = max(x2 - x1, y2 - y1) * CONTEXT / 2
                x, y = (x1 + x2) / 2, (y1 + y2) / 2
                crop = film.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
                small = np.asarray(crop.resize((model.size, model.size), Image.Resampling.BILINEAR))
                pixels = torch.tensor(small).permute(2, 0, 1)[None].float() / 255
                model._known.clear()  # a phrase is encoded again for each completion
                cosine = float(model.images(pixels)[0] @ model.texts([group.prompt.example.phrase])[0])
            totals.append(float(answer.well_formed) + iou + cosine)
    return torch.tensor(totals).view(len(groups), G)


def pair_iou(a: Box, b: Box) -> float:
    """IoU of two boxes, in Python."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    whole = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / whole if whole > 0 else 0.0


def loop_iou(answers: Sequence[Sequence[Answer]], groups: Sequence[Group]) -> torch.Tensor:
    """IoU of the best pair of each completion, one pair at a time: [B, G]."""
    found = [
        [
            max((pair_iou(a, b) for a in answer.boxes or () for b in group.prompt.example.boxes), default=0.0)
            for answer in row
        ]
        for row, group in zip(answers, groups, strict=True)
    ]
    return torch.tensor(found)


def _read(groups: Sequence[Group]) -> list[list[Answer]]:
    return [[read_answer(r.text, group.prompt) for r in group.rollouts] for group in groups]


def seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median over repeats, after one call that does not count."""
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return median(taken)


def measure(prompts: int, films: int, encoder_steps: int) -> dict[str, float]:
    """Seconds of each way on phantom films that are drawn for it.

    Raises:
        ValueError: the two ways do not agree on the IoU.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_phantom(PhantomConfig(out=str(data), count=films, val=8, test=8), workers=1)
        build_encoder(BuildConfig(data=str(data), out=f"{folder}/encoder", steps=encoder_steps))
        encoder = f"phantom:{folder}/encoder"
        train = [example for example in load_records(data) if example.split == "train"]
        groups = step_groups(data, prompts, train)
        images = [read_image(data / group.prompt.example.image) for group in groups]
        config = RewardConfig(semantic_weight=1.0, encoder=encoder)
        whole, plain = (Scorer(c, "brief", 64, examples=train) for c in (config, RewardConfig()))
        answers, truths = _read(groups), [group.prompt.example.boxes for group in groups]
        single = torch.tensor(
            [[len(t) == 1 and len(a.boxes or ()) == 1 for a in row] for row, t in zip(answers, truths, strict=True)]
        )
        gap = (answer_iou(answers, truths) - loop_iou(answers, groups))[single].abs().max().item()
        if gap > 1e-5:
            raise ValueError(f"want the same IoU from both ways; they differ by {gap}")
        return {
            "ours, all rewards": seconds(lambda: ours(groups, whole)),
            "ours, without semantic": seconds(lambda: ours(groups, plain)),
            "peers' way, all rewards": seconds(lambda: peers(groups, encoder, images), 2),
            "IoU alone, one launch": seconds(lambda: answer_iou(answers, truths)),
            "IoU alone, a pair at a time": seconds(lambda: loop_iou(answers, groups)),
        }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.rewards", description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--films", type=int, default=600)
    parser.add_argument("--encoder-steps", type=int, default=100)
    parser.add_argument("--run", type=Path, default=None, help="folder of a run: its seconds a step are the whole")
    args = parser.parse_args()
    step = None
    if args.run:
        rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
        step = median(row["seconds"] for row in rows)
        print(f"{args.run.name}: {len(rows)} steps, median {step:.3f} s")
    print(f"{args.prompts} prompts of {G} completions, {torch.get_num_threads()} threads")
    for name, taken in measure(args.prompts, args.films, args.encoder_steps).items():
        print(f"  {name:30}{taken * 1e3:10.1f} ms" + (f"{taken / step:10.1%} of a step" if step else ""))


if __name__ == "__main__":
    main()
