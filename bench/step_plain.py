"""The plain side of `bench.steps`: GRPO as VLM-R1 and MedGround-R1 run it, written anew from their algorithm.

G rows [prompt | completion] for each prompt, the image preprocessed and encoded once for each row; `generate`; logits
of every token, the prompt's included, and their log-softmax, row by row; the policy itself, detached, as old policy.
What the two would do besides is left out: DeepSpeed (see `bench.zero`) and a reference policy. Their loss is a mean
over sequences; here, as on the other sides, one over all tokens of the step.
"""

import gc
import time

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from bench.random_model import TEMPLATE
from bench.step_job import LR, NO_LIMIT, PHASES, Capture, Job, Seconds, adapt, gradients, reward
from bench.step_rows import END, exact_lengths, make_row_processor
from medground.prompts import TEMPLATES
from medground_kernels.group_advantage import group_advantage_reference

EPSILON = 0.2


class PlainSide:
    """A transformers model, its processor and an AdamW.

    Attributes:
        capture: what the first step was.
    """

    def __init__(self, job: Job):
        self.job, self.steps = job, 0
        self.capture: Capture | None = None
        self._processor = make_row_processor(job)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            job.model, dtype=job.loaded_dtype, attn_implementation="sdpa"
        ).to(job.device)
        if job.workload.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model = adapt(model, job)
        trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
        self._seconds: Seconds = {}
        self._last = 0.0

    def step(self) -> Seconds:
        job, at_once = self.job, self.job.workload.groups_at_once
        self._seconds, self._last = dict.fromkeys(PHASES, 0.0), self._now()
        tokens = sum(map(sum, job.lengths(self.steps)))
        rows: list[tuple[Tensor, list[Tensor], Tensor]] = []
        for first in range(0, len(job.examples), at_once):
            groups = slice(first, first + at_once)
            inputs = self._inputs(groups)
            self._lap("data")
            prompts, completions, mask = self._generate(inputs, groups)
            self._lap("decode")
            advantages = self._advantages(completions, mask)
            self._lap("reward")
            self._loss(inputs, prompts, completions, mask, advantages, tokens).backward()
            self._lap("update")
            found = [ids[seen.bool()].cpu() for ids, seen in zip(completions, mask, strict=True)]
            rows.append((prompts.cpu(), found, advantages.cpu()))
        if self.capture is None:
            self.capture = self._capture(rows)
            self._last = self._now()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), NO_LIMIT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._lap("optimizer")
        self.steps += 1
        return {"step": sum(self._seconds.values())} | self._seconds

    def close(self) -> None:
        del self._model, self._optimizer
        gc.collect()
        torch.cuda.empty_cache()

    def _inputs(self, groups: slice) -> dict[str, Tensor]:
        """G copies of each prompt and image, through the processor."""
        texts, images = [], []
        for example in self.job.examples[groups]:
            content = [{"type": "image"}, {"type": "text", "text": TEMPLATES[TEMPLATE].format(phrase=example.phrase)}]
            text = self._processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            image = Image.open(self.job.data / example.image).convert("RGB")
            texts += [text] * self.job.size.G
            images += [image] * self.job.size.G
        found = self._processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
        return {name: value.to(self.job.device) for name, value in found.items()}

    @torch.no_grad()
    def _generate(self, inputs: dict[str, Tensor], groups: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [S, P], completions [S, C] and which of their tokens count [S, C]."""
        job, config, end = self.job, self._model.config, self._processor.tokenizer.convert_tokens_to_ids(END)
        sampling = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=job.size.C, eos_token_id=end,
            pad_token_id=config.text_config.pad_token_id
        )  # fmt: skip
        self._model.eval()
        with self._autocast():
            out = self._model.generate(
                **inputs,
                generation_config=sampling,
                logits_processor=exact_lengths(job, self.steps, end, config, lambda: self._lap("prefill"), groups),
            )
        self._model.train()
        P = inputs["input_ids"].shape[1]
        completions = out[:, P:]
        lengths = torch.tensor(job.lengths(self.steps)[groups]).flatten().to(out.device)
        mask = torch.arange(completions.shape[1], device=out.device) < lengths[:, None]
        if not (completions.gather(1, lengths[:, None] - 1) == end).all() or int(lengths.max()) != completions.shape[1]:
            raise ValueError(f"want completions of the lengths {lengths.tolist()}; got {tuple(completions.shape)}")
        return out[:, :P], completions, mask.int()

    def _advantages(self, completions: Tensor, mask: Tensor) -> Tensor:
        """[S]."""
        texts = [
            self._processor.tokenizer.decode(ids[seen.bool()], skip_special_tokens=True)
            for ids, seen in zip(completions, mask, strict=True)
        ]
        rewards = torch.tensor([reward(text) for text in texts]).view(-1, self.job.size.G)
        return group_advantage_reference(rewards, normalize="group").flatten().to(self.job.device)

    def _loss(self, inputs, prompts, completions, mask, advantages, tokens) -> Tensor:
        ids = torch.cat([prompts, completions], 1)
        seen = torch.cat([inputs["attention_mask"], mask], 1)
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(mask)], 1)
        with self._autocast():
            logits = self._model(
                input_ids=ids, attention_mask=seen, mm_token_type_ids=kinds, use_cache=False,
                pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"]
            ).logits[:, :-1]  # fmt: skip
        rows = [
            row.log_softmax(-1).gather(1, wanted[:, None])[:, 0] for row, wanted in zip(logits, ids[:, 1:], strict=True)
        ]
        logp = torch.stack(rows)[:, prompts.shape[1] - 1 :]
        ratio = (logp - logp.detach()).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        advantages = advantages[:, None]
        return -(torch.min(ratio * advantages, clipped * advantages) * mask).sum() / tokens

    def _capture(self, rows: list[tuple[Tensor, list[Tensor], Tensor]]) -> Capture:
        B, G = len(self.job.examples), self.job.size.G
        completions = [ids for _, found, _ in rows for ids in found]
        return Capture(
            torch.cat([prompts for prompts, _, _ in rows])[::G],
            [completions[b * G : (b + 1) * G] for b in range(B)],
            torch.cat([advantages for _, _, advantages in rows]).view(B, G),
            gradients(self._model),
        )

    def _autocast(self):
        return torch.autocast(self.job.device.type, torch.bfloat16, enabled=self.job.device.type == "cuda")

    def _lap(self, phase: str) -> None:
        now = self._now()
        self._seconds[phase] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
