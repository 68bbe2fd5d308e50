"""moe_gate: which experts a token goes to, with which weight, and which row of the expert-sorted tokens it gets.

    p = softmax(logits); the k largest are chosen; weights = p of them, divided by their sum if renormalised
    aux_loss = num_experts / k * sum over experts of (mean p) * (share of choices per token)      1 when balanced
    z_loss   = mean over tokens of logsumexp(logits)^2

Sources: Shazeer et al. 2017 (arXiv:1701.06538), top-k gating; Lepikhin et al. 2020, "GShard" (arXiv:2006.16668), the
capacity and the order of dropping; Fedus et al. 2021, "Switch Transformers" (arXiv:2101.03961), the auxiliary loss;
Zoph et al. 2022, "ST-MoE" (arXiv:2202.08906), the z-loss.
Limit: memory: the logits are read once forward, read and written once backward (`tokens * experts * itemsize` each);
the sorting is a counting sort on CPU. On GPUs nothing here waits for the device: all shapes are known beforehand.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_dtype, require
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.ops.moe_gating import cpu, reference

__all__ = ["Routing", "moe_capacity", "moe_gate"]

DROP = ("position", "probability", "random")


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where tokens go: what `moe_gate` returns, `moe_dispatch` and `moe_combine` take.

    A *choice* is one of a token's k experts; a *row* is a place among the tokens sorted by expert.

    Attributes:
        weights: [tokens, k], fp32 (fp64 for fp64 logits), differentiable: of each choice, before any dropping.
        experts: [tokens, k], int64: the expert of each choice, the most probable first.
        slots: [tokens, k], int64: the row of each choice, -1 if it was dropped.
        sources: [rows], int64: the choice t * k + j of each row, -1 if there is none.
        ends: [num_experts], int32: one past each expert's last row: what `grouped_gemm` takes. Padded rows have
            their expert's at [expert * capacity, (expert + 1) * capacity) instead.
        counts: [num_experts], int64: choices of each expert, dropped ones included.
        aux_loss: scalar, differentiable through the probabilities: 1 when experts are chosen evenly.
        z_loss: scalar, differentiable: keeps logits small.
    """

    weights: Tensor
    experts: Tensor
    slots: Tensor
    sources: Tensor
    ends: Tensor
    counts: Tensor
    aux_loss: Tensor
    z_loss: Tensor

    @property
    def num_rows(self) -> int:
        """Rows that `moe_dispatch` makes: tokens * k, or num_experts * capacity if padded."""
        return self.sources.shape[0]


def moe_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float, minimum: int = 4) -> int:
    """The rows of one expert: `factor` times its share of the choices, rounded up, and at least `minimum`."""
    return max(math.ceil(num_tokens * top_k / num_experts * factor), minimum)


def moe_gate(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    capacity: int | None = None,
    drop: str = "position",
    padded: bool = False,
    generator: torch.Generator | None = None,
) -> Routing:
    """Route tokens to their most probable experts.

    Args:
        logits: [tokens, num_experts], fp32, bf16, fp16 or fp64; any strides. Equal ones: the first expert wins.
        top_k: experts per token.
        renormalize: a token's weights sum to 1 (Mixtral, Qwen3); else they are the probabilities (Switch).
        capacity: most rows of one expert (see `moe_capacity`); the choices that find none are dropped. None: no
            choice is ever dropped.
        drop: who gets the rows of a full expert: "position" (first choices before second ones, then earlier tokens),
            "probability" (the most probable choices) or "random".
        padded: every expert gets `capacity` rows, used or not: [num_experts, capacity, hidden] for a batched product
            or an all-to-all. Needs a capacity.
        generator: of the random numbers of drop="random"; None for torch's default.

    Returns:
        The routing. Its integers do not depend on gradients: dropping passes none.

    Raises:
        KernelArgumentError: top_k or capacity out of range, an unknown drop, padded without a capacity.
    """
    check_dtype("moe_gate", "logits", logits)
    require(logits.dim() == 2, f"moe_gate: logits has shape {tuple(logits.shape)}; expected [tokens, num_experts]")
    tokens, num_experts = logits.shape
    require(1 <= top_k <= num_experts, f"moe_gate: top_k is {top_k}; expected 1 to {num_experts}, the experts")
    require(capacity is None or capacity > 0, f"moe_gate: capacity is {capacity}; expected a positive number or None")
    require(drop in DROP, f"moe_gate: drop is {drop!r}; supported are {', '.join(DROP)}")
    require(not padded or capacity is not None, "moe_gate: padded is True without a capacity; expected a capacity")
    weights, experts, mean_probs, z_loss, _ = _GATE(logits.contiguous(), top_k, renormalize)
    priority = None
    if capacity is not None and drop == "random":
        priority = torch.rand(experts.shape, generator=generator, device=logits.device)
    elif capacity is not None and drop == "probability":
        # The probability itself, not the logit or the renormalised weight: those do not compare across tokens.
        priority = torch.softmax(logits.detach(), -1, dtype=weights.dtype).gather(1, experts)
    slots, sources, ends, counts = _SORT(experts, priority, num_experts, capacity or 0, padded)
    share = counts.to(mean_probs.dtype) * (num_experts / (max(1, tokens) * top_k))
    return Routing(weights, experts, slots, sources, ends, counts, (mean_probs * share).sum(), z_loss)


def _implementation(x: Tensor) -> Any:
    backend = backend_for(x)
    if backend == "triton":
        from ds_kernels.ops.moe_gating import triton

        return triton
    return cpu if backend == "cpu" else reference


def _gate(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    found = _implementation(logits).gate(logits, top_k, renormalize)
    return found


def _gate_fake(logits: Tensor, top_k: int, _renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, num_experts = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(tokens, top_k, dtype=dtype),
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(num_experts, dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty(tokens, dtype=dtype),
    )


def _gate_backward(
    grad_weights: Tensor, grad_mean: Tensor, grad_z: Tensor, logits: Tensor, weights: Tensor, experts: Tensor,
    lse: Tensor, renormalize: bool,
) -> Tensor:  # fmt: skip
    grad: Tensor = _implementation(logits).gate_backward(
        grad_weights, grad_mean, grad_z, logits, weights, experts, lse, renormalize
    )
    return grad


def _gate_backward_fake(
    _grad_weights: Tensor, _grad_mean: Tensor, _grad_z: Tensor, logits: Tensor, _weights: Tensor, _experts: Tensor,
    _lse: Tensor, _renormalize: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits)


def _sort(
    experts: Tensor, priority: Tensor | None, num_experts: int, capacity: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend_for(experts) == "cpu":
        return cpu.sort(experts, priority, num_experts, capacity, padded)
    return reference.sort(experts, priority, num_experts, capacity, padded)


def _sort_fake(
    experts: Tensor, _priority: Tensor | None, num_experts: int, capacity: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(experts),
        experts.new_empty(num_experts * capacity if padded else experts.numel()),
        experts.new_empty(num_experts, dtype=torch.int32),
        experts.new_empty(num_experts),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, ctx.renormalize = inputs
    weights, experts, _, _, lse = output
    ctx.save_for_backward(logits, weights, experts, lse)
    ctx.mark_non_differentiable(experts, lse)


def _gradients(
    ctx: Any, grad_weights: Tensor, _experts: Tensor, grad_mean: Tensor, grad_z: Tensor, _lse: Tensor
) -> tuple[Tensor | None, ...]:
    grads = (grad_weights.contiguous(), grad_mean.contiguous(), grad_z)
    return _GATE_BACKWARD(*grads, *ctx.saved_tensors, ctx.renormalize), None, None


_SORT = Op(
    "moe_sort(Tensor experts, Tensor? priority, int num_experts, int capacity, bool padded) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _sort,
    fake=_sort_fake,
)
_GATE_BACKWARD = Op(
    "moe_gate_backward(Tensor grad_weights, Tensor grad_mean, Tensor grad_z, Tensor logits, Tensor weights, "
    "Tensor experts, Tensor lse, bool renormalize) -> Tensor",
    _gate_backward,
    fake=_gate_backward_fake,
)
_GATE = Op(
    "moe_gate(Tensor logits, int top_k, bool renormalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gate,
    fake=_gate_fake,
    setup_context=_save,
    backward=_gradients,
)
