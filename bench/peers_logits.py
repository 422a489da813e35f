"""Peers that start from logits, or only look at them: log-probabilities, the loss from logits, sampling."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers import Padded, gradients, load, needs_cuda, per_token_loss, picked, picked_and_entropy
from bench.race import Contender, Result
from bench.workloads import OPTIONS, Batch


def torch_token_logprob(logits: Tensor, targets: Tensor, dlogp: Tensor | None, compiled: bool = False) -> Contender:
    """Float32 log-softmax and gather; entropy in the forward pass only, where nobody asks for its gradient."""
    plain = picked_and_entropy if dlogp is None else picked
    return Contender(lambda: _scored(torch.compile(plain) if compiled else plain, logits, targets, dlogp))


def trl_token_logprob(logits: Tensor, targets: Tensor, dlogp: Tensor | None) -> Contender:
    """`selective_log_softmax_and_entropy`; its gradient goes into memory of its own."""

    def build() -> Callable[[], Result]:
        needs_cuda()
        kernel = load("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
        return _scored(kernel, logits, targets, dlogp)

    return Contender(build)


def _scored(fn: Callable, logits: Tensor, targets: Tensor, dlogp: Tensor | None) -> Callable[[], Result]:
    def forward() -> Result:
        with torch.no_grad():
            return dict(zip(("logp", "entropy"), fn(logits, targets), strict=True))

    def forward_and_backward() -> Result:
        out = fn(logits, targets)
        logp = out if isinstance(out, Tensor) else out[0]
        return {"logp": logp.detach(), **gradients(logp, {"dlogits": logits}, dlogp)}

    return forward if dlogp is None else forward_and_backward


def torch_loss(logp: Tensor, batch: Batch, compiled: bool = False) -> Contender:
    """The loss of flat log-probabilities, without statistics."""

    def forward(logp: Tensor, advantage: Tensor, old: Tensor, ref: Tensor) -> Tensor:
        return per_token_loss(logp, advantage, old, ref).mean()

    def build() -> Callable[[], Result]:
        step = torch.compile(forward) if compiled else forward
        advantage = batch.advantages.repeat_interleave(batch.cu_seqlens.diff().long())

        def call() -> Result:
            loss = step(logp, advantage, batch.old_logp, batch.ref_logp)
            return {"loss": loss.detach(), **gradients(loss, {"dlogp": logp})}

        return call

    return Contender(build)


def trl_loss(logp: Tensor, batch: Batch) -> Contender:
    """TRL's loss of padded log-probabilities."""

    def build() -> Callable[[], Result]:
        padded = Padded(batch)
        leaf = padded.pad(logp).requires_grad_()

        def call() -> Result:
            loss = padded.loss(leaf)
            grad = torch.autograd.grad(loss, leaf)[0]
            return {"loss": loss.detach(), "dlogp": lambda: grad[padded.mask]}

        return call

    return Contender(build)


def torch_logits_grpo(logits: Tensor, batch: Batch, compiled: bool = False) -> Contender:
    """From logits [N, V]: float32 log-softmax, gather, loss."""

    def forward(logits: Tensor, targets: Tensor, advantage: Tensor, old: Tensor, ref: Tensor) -> Tensor:
        return per_token_loss(picked(logits, targets), advantage, old, ref).mean()

    def build() -> Callable[[], Result]:
        step = torch.compile(forward) if compiled else forward
        advantage = batch.advantages.repeat_interleave(batch.cu_seqlens.diff().long())

        def call() -> Result:
            loss = step(logits, batch.targets, advantage, batch.old_logp, batch.ref_logp)
            return {"loss": loss.detach(), **gradients(loss, {"dlogits": logits})}

        return call

    return Contender(build)


def trl_logits_grpo(logits: Tensor, batch: Batch) -> Contender:
    """TRL's row kernel on flat logits, scattered to [S, T] for its loss."""

    def build() -> Callable[[], Result]:
        needs_cuda()
        kernel = load("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
        padded = Padded(batch)

        def call() -> Result:
            logp, _ = kernel(logits, batch.targets)
            loss = padded.loss(logp.new_zeros(padded.mask.shape).masked_scatter(padded.mask, logp))
            return {"loss": loss.detach(), **gradients(loss, {"dlogits": logits})}

        return call

    return Contender(build)


def liger_logits_grpo(logits: Tensor, batch: Batch) -> Contender:
    """`triton_grpo_loss` in place, on [S, T+1, V], the only layout it takes; the padding costs time there too."""
    state: dict[str, Tensor] = {}

    def restore() -> None:
        if not state:  # on the first call, so that nothing is allocated where Liger cannot run
            padded = Padded(batch)
            source = torch.zeros((*padded.mask.shape, logits.shape[1]), dtype=logits.dtype, device=logits.device)
            source[padded.mask] = logits.detach()
            source = torch.nn.functional.pad(source, (0, 0, 0, 1))
            state.update(source=source, work=source.clone().requires_grad_())
        state["work"].data.copy_(state["source"])

    def build() -> Callable[[], Result]:
        needs_cuda()
        loss_of = load("liger_kernel.transformers.grpo_loss").triton_grpo_loss
        padded = Padded(batch)
        mask = padded.mask.int()

        def call() -> Result:
            work = state["work"]
            loss, _ = loss_of(
                work, padded.old, padded.ref, padded.targets, padded.advantages, mask, temperature=1.0,
                beta=OPTIONS.beta, eps_low=0.2, eps_high=0.2, inplace=True, loss_type="dapo", reduce=True
            )  # fmt: skip
            grad = torch.autograd.grad(loss, work)[0]
            return {"loss": loss.detach(), "dlogits": lambda: grad[:, :-1][padded.mask]}

        return call

    return Contender(build, prepare=restore)


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities [R, V] under what top-k, then top-p leave, equals of the last included; dtype of `logits`."""
    z = logits / temperature
    if top_k:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered = z.sort(-1, descending=True).values
        probs = ordered.softmax(-1)
        # a token stays while those before it hold less than top_p
        lowest = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, torch.inf).amin(-1, keepdim=True)
        z = z.masked_fill(z < lowest, -torch.inf)
    return z.log_softmax(-1)


def torch_sample(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Contender:
    """Float32 softmax and `torch.multinomial`."""

    def call() -> Result:
        logp = filtered(logits.float(), temperature, top_k, top_p)
        token = torch.multinomial(logp.exp(), 1)
        return {"token": token[:, 0], "logp": logp.gather(-1, token)[:, 0]}

    return Contender(lambda: call)


def exponential_sample(logits: Tensor, temperature: float) -> Contender:
    """torch.compile of nano-vllm's sampler: softmax over exponential noise, argmax; and the log-probability."""

    def sample(logits: Tensor) -> tuple[Tensor, Tensor]:
        logp = (logits.float() / temperature).log_softmax(-1)
        noise = torch.empty_like(logp).exponential_(1).clamp_min_(1e-10)
        token = (logp.exp() / noise).argmax(-1)
        return token, logp.gather(-1, token[:, None])[:, 0]

    def build() -> Callable[[], Result]:
        step = torch.compile(sample)
        return lambda: dict(zip(("token", "logp"), step(logits), strict=True))

    return Contender(build)
