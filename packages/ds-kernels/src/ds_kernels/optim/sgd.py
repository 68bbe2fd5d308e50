"""SGD with momentum (see `functional.sgd_step` for formula and limit)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ds_kernels._checks import require
from ds_kernels.optim._base import Batch, ElementwiseOptimizer, Piece, check_rate
from ds_kernels.optim.functional import sgd_step

__all__ = ["SGD"]


class SGD(ElementwiseOptimizer):
    """SGD with torch.optim's arguments. State per parameter: `step`, with momentum `momentum_buffer`. Further keywords:
    `FlatOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **storage: Any,
    ) -> None:
        check_rate("SGD", lr=lr, momentum=momentum, weight_decay=weight_decay)
        require(
            not nesterov or (momentum > 0 and dampening == 0),
            f"SGD: nesterov with momentum {momentum} and dampening {dampening}; expected momentum > 0 and dampening 0",
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **storage)

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def update(self, batch: Batch, piece: Piece, seed: int | None) -> None:
        group = batch.slots[piece.slot].group
        sgd_step(
            piece.param, piece.grad, piece.state.get("momentum_buffer") if group["momentum"] else None,
            lr=float(group["lr"]), momentum=group["momentum"], dampening=group["dampening"],
            nesterov=group["nesterov"], first=int(piece.state["step"]) == 1, weight_decay=group["weight_decay"],
            maximize=group["maximize"], grad_scale=batch.grad_scale, out=piece.out, seed=seed,
        )  # fmt: skip
