"""Advantages of completions within their group (Shao et al. 2024, arXiv:2402.03300).

    normalize="group":  A[b, g] = (R[b, g] - mean_g R[b]) / (std_g R[b] + eps)
    normalize="none":   A[b, g] =  R[b, g] - mean_g R[b]

The spread is the sample standard deviation (G - 1), as TRL and the official code have it.
"""

from typing import Literal

from torch import Tensor


def group_advantage(rewards: Tensor, *, normalize: Literal["group", "none"] = "group", eps: float = 1e-4) -> Tensor:
    """Advantage of each completion over the others of its prompt.

    Args:
        rewards: [B, G], float32, G >= 2.
        normalize: group divides by the group's spread, none does not.
        eps: added to the spread, in units of reward.

    Returns:
        [B, G], float32; a group whose rewards are all equal gives exactly 0 everywhere.

    Raises:
        ValueError: the shape or `normalize` is not as above.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"want rewards [B, G] with G >= 2; got {tuple(rewards.shape)}")
    if normalize not in ("group", "none"):
        raise ValueError(f"want normalize group or none; got {normalize!r}")
    centred = rewards - rewards.mean(1, keepdim=True)
    # the mean of equal numbers may differ from them by rounding, and eps would not hide that
    centred = centred.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0)
    return centred / (rewards.std(1, keepdim=True) + eps) if normalize == "group" else centred
