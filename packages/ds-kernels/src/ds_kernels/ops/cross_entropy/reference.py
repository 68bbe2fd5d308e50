"""The specification of cross_entropy: plain torch, in fp32 (fp64 for fp64), rows by vocabulary.

With lse = log(sum_j exp(l_j)), smoothing e, vocabulary V and z-loss weight z, a row's loss is
    lse - (1 - e) * l_target - e / V * sum_j l_j + z * lse^2
and its gradient, with p = exp(l - lse),
    d/dl_j = (1 + 2 z lse) * p_j - (1 - e) * [j == target] - e / V.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_entropy", "cross_entropy_backward", "row_losses", "wide"]


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


def row_losses(
    lse: Tensor, picked: Tensor, total: Tensor, valid: Tensor, vocabulary: int, smoothing: float, z_loss: float
) -> Tensor:
    """The losses [rows] from each row's lse, its target's logit and the sum of its logits; 0 where not valid."""
    loss = lse - (1.0 - smoothing) * picked
    if smoothing:
        loss = loss - smoothing / vocabulary * total
    if z_loss:
        loss = loss + z_loss * lse.square()
    return torch.where(valid, loss, 0.0)


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """`(loss, lse)`, both [rows], fp32 or fp64; the loss is 0 where the target is `ignore_index`."""
    values = wide(logits)
    lse = torch.logsumexp(values, -1)
    valid = target != ignore_index
    picked = values.gather(-1, torch.where(valid, target, 0).unsqueeze(-1)).squeeze(-1)
    return row_losses(lse, picked, values.sum(-1), valid, logits.shape[-1], smoothing, z_loss), lse


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> Tensor:
    """The gradient [rows, vocabulary] in the dtype of the logits, from the losses' gradient and the saved lse."""
    valid = target != ignore_index
    scale = torch.where(valid, grad, 0.0).unsqueeze(-1)
    lse = lse.unsqueeze(-1)
    result = torch.exp(wide(logits) - lse) * (1.0 + 2.0 * z_loss * lse) - smoothing / logits.shape[-1]
    index = torch.where(valid, target, 0).unsqueeze(-1)
    result.scatter_add_(-1, index, torch.full_like(lse, smoothing - 1.0))
    return torch.where(valid.unsqueeze(-1), result * scale, 0.0).to(logits.dtype)
