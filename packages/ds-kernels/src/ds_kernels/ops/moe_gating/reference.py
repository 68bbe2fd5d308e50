"""The specification of moe_gate: plain torch, the gate in fp32 (fp64 for fp64), the sorting in whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gate", "gate_backward", "sort"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gate(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(weights, experts, mean_probs, z_loss, lse)` of logits [tokens, num_experts].

    experts [tokens, k]: the largest logits, of equal ones the first expert; weights [tokens, k]: their softmax
    probabilities, divided by their sum if renormalize; mean_probs [num_experts]: over the tokens; z_loss: the mean of
    lse^2; lse [tokens]: log of the sum of exp(logits).
    """
    wide = _wide(logits)
    best, experts = torch.sort(wide, dim=-1, descending=True, stable=True)
    best, experts = best[:, :top_k], experts[:, :top_k].contiguous()
    lse = torch.logsumexp(wide, -1)
    weights = torch.softmax(best, -1) if renormalize else torch.exp(best - lse.unsqueeze(1))
    tokens = max(1, logits.shape[0])
    mean_probs = torch.exp(wide - lse.unsqueeze(1)).sum(0) / tokens
    return weights, experts, mean_probs, lse.square().sum() / tokens, lse


def gate_backward(
    grad_weights: Tensor, grad_mean: Tensor, grad_z: Tensor, logits: Tensor, weights: Tensor, experts: Tensor,
    lse: Tensor, renormalize: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the logits.

    With p = exp(logits - lse), n tokens, s_t = sum over j of w_tj * gw_tj:
    p * (gm / n - sum_e p_e * gm_e / n + 2 * gz * lse / n - s) and w_j * gw_j at the chosen experts; renormalised, the
    s belongs to the chosen experts alone: w_j * (gw_j - s).
    """
    probs = torch.exp(_wide(logits) - lse.unsqueeze(1))
    tokens = max(1, logits.shape[0])
    inner = (weights * grad_weights).sum(1, keepdim=True)
    pull = probs @ grad_mean / tokens - 2 / tokens * grad_z * lse
    whole = probs * (grad_mean / tokens - pull.unsqueeze(1) - (0 if renormalize else inner))
    chosen = weights * (grad_weights - inner if renormalize else grad_weights)
    return whole.scatter_add(1, experts, chosen).to(logits.dtype)


def sort(
    experts: Tensor, priority: Tensor | None, num_experts: int, capacity: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(slots, sources, ends, counts)`: the rows of the choices, sorted by expert.

    Within an expert, choices come by priority (the largest first), then all first choices before all second ones, then
    by token. The first `capacity` of them (0: all) get a row; rows follow each other, or start at
    expert * capacity if padded.

    slots [tokens, k]: the row of each choice, -1 if dropped; sources [rows]: the choice t * k + j of each row, -1 if
    none; ends [num_experts], int32: one past each expert's last row, without padding; counts [num_experts]: choices
    of each expert, dropped ones included. No step waits for the device.
    """
    tokens, top_k = experts.shape
    device = experts.device
    flat = experts.t().flatten()
    if priority is None:
        order = torch.sort(flat, stable=True).indices
    else:
        ranked = torch.sort(priority.t().flatten(), descending=True, stable=True).indices
        order = ranked[torch.sort(flat[ranked], stable=True).indices]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add(0, flat, torch.ones_like(flat))
    kept = counts.clamp(max=capacity) if capacity else counts
    ends = kept.cumsum(0)
    expert = flat[order]
    place = torch.arange(flat.shape[0], device=device) - (counts.cumsum(0) - counts)[expert]
    row = (expert * capacity if padded else (ends - kept)[expert]) + place
    row = row.masked_fill(place >= kept[expert], -1)
    choice = order % max(1, tokens) * top_k + order // max(1, tokens)
    slots = torch.empty(tokens * top_k, dtype=torch.int64, device=device).scatter(0, choice, row)
    num_rows = num_experts * capacity if padded else tokens * top_k
    sources = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=device)
    sources = sources.scatter(0, torch.where(row < 0, num_rows, row), choice)[:num_rows].contiguous()
    return slots.view(tokens, top_k), sources, ends.int(), counts
