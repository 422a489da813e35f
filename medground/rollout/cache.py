"""The device's side of decoding: keys, values and state of the running rows, at fixed addresses.

A *slot* holds a row, a *berth* the prompt of a group. A prompt's keys and values lie in its berth once, whatever the
number of rows that read them; each row's own tokens lie in its slot. Rows are numbered from 0 without holes, so that a
step takes the first R slots as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from medground_kernels.prefix_decode import prefix_decode
from medground_kernels.sample_token import SampledToken, sample_token

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLTextConfig

    from medground.packing import Packed
    from medground.policy import Policy
    from medground.rollout.decoder import Decoder


class Sampling(NamedTuple):
    """How a token is drawn from logits: see `sample_token`."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0


class Shape(NamedTuple):
    """Sizes of a cache: berths, slots, rows of a group, longest prompt and completion in tokens."""

    berths: int
    slots: int
    copies: int
    longest_prompt: int
    max_new_tokens: int


def bytes_per_token(config: Qwen2_5_VLTextConfig, dtype: torch.dtype) -> int:
    """Memory of a token's keys and values in all layers."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize


class Cache:
    """Berths and slots, and the step that extends every row by one token."""

    def __init__(self, policy: Policy, decoder: Decoder, shape: Shape, stop: Sequence[int]):
        text, weight = policy.vlm.config.text_config, policy.vlm.lm_head.weight
        device, heads = weight.device, text.num_key_value_heads
        head_dim = text.hidden_size // text.num_attention_heads
        self.shape, self._policy, self._decoder = shape, policy, decoder
        kept = (text.num_hidden_layers, 2)  # keys and values of every layer
        P, C, slots, berths = shape.longest_prompt, shape.max_new_tokens, shape.slots, shape.berths
        self._prefixes = torch.zeros(*kept, berths, heads, P, head_dim, dtype=weight.dtype, device=device)
        self._suffixes = torch.zeros(*kept, slots, heads, C, head_dim, dtype=weight.dtype, device=device)
        self._prefix_lengths = torch.zeros(berths, dtype=torch.int32, device=device)
        self._first_logits = torch.zeros(berths, len(weight), dtype=weight.dtype, device=device)
        self._starts = torch.zeros(berths, dtype=torch.int64, device=device)  # position of the first completion token
        self._members = torch.full((berths, shape.copies), -1, dtype=torch.int64, device=device)
        # of each row: where it stands in members, stream of random numbers, position of its first token, tokens fed to
        # the model so far, newest token
        self._places, self._seeds, self._start, self._token = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4)
        )
        self._fed = torch.zeros(slots, dtype=torch.int32, device=device)
        # the last column takes what a row draws that has ended and not left yet
        self._tokens = torch.zeros(slots, C + 1, dtype=torch.int64, device=device)
        self._logps = torch.zeros(slots, C + 1, dtype=torch.float32, device=device)
        self._stopped = torch.zeros(slots, dtype=torch.bool, device=device)
        self._banned, self._stop = (torch.tensor(ids, device=device) for ids in (policy.never_sampled, stop))
        self._graphs: dict[tuple[int, Sampling], torch.cuda.CUDAGraph] = {}
        # graphs run one after another: they may share the memory of what lies between
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def prefill(self, packed: Packed, berths: Sequence[int], lengths: Sequence[int], following: Sequence[int]) -> None:
        """Run prompts and keep them, each in its berth.

        Args:
            packed: the prompts.
            berths: one for each.
            lengths: their tokens.
            following: the position after their last one.
        """
        device = self._prefixes.device
        at = torch.tensor(berths, device=device)
        rows = at.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))
        within = torch.cat([torch.arange(n) for n in lengths]).to(device)

        def store(layer: int, k: Tensor, v: Tensor) -> None:
            for kind, heads in enumerate((k, v)):
                self._prefixes[layer, kind, rows, :, within] = heads

        self._first_logits[at] = self._policy.prefill(packed, store)
        self._prefix_lengths[at] = torch.tensor(lengths, dtype=torch.int32, device=device)
        self._starts[at] = torch.tensor(following, device=device)

    def start(self, slots: Sequence[int], berths: Sequence[int], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """Draw the first token of new rows: whether each has stopped already, bool [rows]."""
        device = self._places.device
        rows, from_berths = torch.tensor(slots, device=device), torch.tensor(berths, device=device)
        streams = torch.tensor(seeds, device=device)
        drawn = self._draw(self._first_logits[from_berths], streams, torch.zeros_like(streams), sampling)
        self._seeds[rows] = streams
        self._start[rows] = self._starts[from_berths]
        self._fed[rows] = 0
        self._token[rows] = drawn.token
        self._tokens[rows, 0], self._logps[rows, 0] = drawn.token, drawn.full_logp
        return torch.isin(drawn.token, self._stop)

    def seat(self, berths: Sequence[int]) -> None:
        """Say which berth each row, from 0 on, reads."""
        members = torch.full(self._members.shape, -1, dtype=torch.int64)
        counts = [0] * len(members)
        places = []
        for row, berth in enumerate(berths):
            members[berth, counts[berth]] = row
            places.append(berth * self.shape.copies + counts[berth])
            counts[berth] += 1
        self._members.copy_(members)
        self._places[: len(places)] = torch.tensor(places, dtype=torch.int64)

    def step(self, rows: int, berths: int, sampling: Sampling) -> Tensor:
        """One more token of the first `rows` rows, which read the first `berths` berths: bool [rows], who has stopped.

        The tensor is overwritten by the next step.
        """
        if self._prefixes.is_cuda:
            self._replay(rows, sampling)
        else:
            self._step(rows, berths, sampling)
        return self._stopped[:rows]

    def completions(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities [rows, max_new_tokens + 1] on the CPU; what lies past a row's end is junk."""
        at = torch.tensor(slots, device=self._tokens.device)
        return self._tokens[at].cpu(), self._logps[at].cpu()

    def move_rows(self, sources: Sequence[int], slots: Sequence[int]) -> None:
        """Move rows to free slots."""
        a, b = (torch.tensor(s, device=self._places.device) for s in (sources, slots))
        self._suffixes[:, :, b] = self._suffixes[:, :, a]
        for state in (self._seeds, self._start, self._fed, self._token, self._tokens, self._logps):
            state[b] = state[a]

    def move_berth(self, source: int, berth: int) -> None:
        """Move a prompt to a free berth."""
        self._prefixes[:, :, berth] = self._prefixes[:, :, source]
        for state in (self._prefix_lengths, self._first_logits, self._starts):
            state[berth] = state[source]

    def _step(self, rows: int, berths: int, sampling: Sampling) -> None:
        fed = self._fed[:rows]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return prefix_decode(
                q,
                k,
                v,
                prefix_k=self._prefixes[layer, 0, :berths],
                prefix_v=self._prefixes[layer, 1, :berths],
                prefix_lengths=self._prefix_lengths[:berths],
                suffix_k=self._suffixes[layer, 0, :rows],
                suffix_v=self._suffixes[layer, 1, :rows],
                suffix_lengths=fed,
                members=self._members[:berths],
                places=self._places[:rows],
                scale=scale,
            )

        logits = self._decoder(self._token[:rows], self._start[:rows] + fed, attend)
        drawn = self._draw(logits, self._seeds[:rows], fed.long() + 1, sampling)
        fed.add_(1).clamp_(max=self.shape.max_new_tokens)
        self._token[:rows] = drawn.token
        at = fed.long()[:, None]
        self._tokens[:rows].scatter_(1, at, drawn.token[:, None])
        self._logps[:rows].scatter_(1, at, drawn.full_logp[:, None])
        self._stopped[:rows] = torch.isin(drawn.token, self._stop)

    def _draw(self, logits: Tensor, seeds: Tensor, steps: Tensor, sampling: Sampling) -> SampledToken:
        return sample_token(logits, **sampling._asdict(), seeds=seeds, step=steps, banned=self._banned)

    def _replay(self, rows: int, sampling: Sampling) -> None:
        """The step as a CUDA graph, recorded when this number of rows first comes."""
        key = (rows, sampling)
        if key not in self._graphs:
            changing = (self._fed, self._token, self._tokens, self._logps, self._stopped)
            before = [state.clone() for state in changing]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels, which a recording may not
                for _ in range(2):
                    self._step(rows, self.shape.berths, sampling)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(rows, self.shape.berths, sampling)
            for state, old in zip(changing, before, strict=True):
                state.copy_(old)
            self._graphs[key] = graph
        self._graphs[key].replay()
