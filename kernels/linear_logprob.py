"""Log-probability and entropy of each sampled token, straight from the hidden states.

    logits = hidden @ weight.T,    then kernels/token_logprob.py

Plain torch: the logits of all scored tokens are in memory at once.
"""

from torch import Tensor

from medground_kernels.token_logprob import TokenLogprob, token_logprob


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0) -> TokenLogprob:
    """Log-probability of each target, and entropy of its distribution, from the head's input.

    Args:
        hidden: [N, H], the final hidden state that predicts each target.
        weight: [V, H], the head.
        targets: [N], int64, below V; a negative target gives 0, 0 and no gradient.
        temperature: sampling temperature, > 0.

    Returns:
        TokenLogprob of float32 [N], both differentiable in `hidden` and `weight`.

    Raises:
        ValueError: shapes, dtypes or the temperature are not as above.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"want hidden [N, H], weight [V, H]; got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    return token_logprob(hidden @ weight.T, targets, temperature=temperature)
