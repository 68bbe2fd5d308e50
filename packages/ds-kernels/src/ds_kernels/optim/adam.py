"""Adam and AdamW (see `functional.adam_step` for formula, sources and limit)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ds_kernels.optim._base import Batch, ElementwiseOptimizer, Piece, check_betas, check_rate
from ds_kernels.optim.functional import adam_step

__all__ = ["Adam", "AdamW", "update_adam"]


def update_adam(group: dict[str, Any], piece: Piece, grad_scale: float, seed: int | None) -> None:
    """Adam on one piece, as its group says."""
    state = piece.state
    maximum: Tensor | None = state["max_exp_avg_sq"] if group.get("amsgrad") else None
    adam_step(
        piece.param, piece.grad, state["exp_avg"], state["exp_avg_sq"], step=int(state["step"]), lr=float(group["lr"]),
        betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
        decoupled=group.get("decoupled_weight_decay", True), bias_correction=group.get("bias_correction", True),
        max_exp_avg_sq=maximum, maximize=group.get("maximize", False), grad_scale=grad_scale, out=piece.out, seed=seed,
    )  # fmt: skip


class Adam(ElementwiseOptimizer):
    """Adam with torch.optim's arguments; `decoupled_weight_decay=True` makes it AdamW.

    State per parameter: `step`, `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`). Further keywords: `FlatOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        bias_correction: bool = True,
        decoupled_weight_decay: bool = False,
        **storage: Any,
    ) -> None:
        check_rate(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(type(self).__name__, betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "bias_correction": bias_correction,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **storage)

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]

    def update(self, batch: Batch, piece: Piece, seed: int | None) -> None:
        update_adam(batch.slots[piece.slot].group, piece, batch.grad_scale, seed)


class AdamW(Adam):
    """Adam with decoupled weight decay, 0.01 by default as torch's."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)
