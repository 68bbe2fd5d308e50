"""Lion (see `functional.lion_step` for formula, source and limit)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ds_kernels.optim._base import Batch, ElementwiseOptimizer, Piece, check_betas, check_rate
from ds_kernels.optim.functional import lion_step

__all__ = ["Lion"]


class Lion(ElementwiseOptimizer):
    """Lion. State per parameter: `step`, `exp_avg`. Further keywords: `FlatOptimizer`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **storage: Any,
    ) -> None:
        check_rate("Lion", lr=lr, weight_decay=weight_decay)
        check_betas("Lion", betas)
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}, **storage
        )

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("exp_avg",)

    def update(self, batch: Batch, piece: Piece, seed: int | None) -> None:
        group = batch.slots[piece.slot].group
        lion_step(
            piece.param, piece.grad, piece.state["exp_avg"], lr=float(group["lr"]), betas=group["betas"],
            weight_decay=group["weight_decay"], maximize=group["maximize"], grad_scale=batch.grad_scale, out=piece.out,
            seed=seed,
        )  # fmt: skip
