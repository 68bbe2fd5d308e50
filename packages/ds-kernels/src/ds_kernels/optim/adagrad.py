"""Adagrad (see `functional.adagrad_step` for formula, source and limit)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ds_kernels.optim._base import Batch, ElementwiseOptimizer, Piece, check_rate
from ds_kernels.optim.functional import adagrad_step

__all__ = ["Adagrad"]


class Adagrad(ElementwiseOptimizer):
    """Adagrad with torch.optim's arguments. State per parameter: `step`, `sum`. Further keywords: `FlatOptimizer`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        **storage: Any,
    ) -> None:
        check_rate(
            "Adagrad",
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
        )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **storage)

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("sum",)

    def allocate(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """As for every optimizer; the sums begin at `initial_accumulator_value`."""
        new = "sum" not in self.state[parameter]
        state = super().allocate(parameter, group)
        if new:
            state["sum"].fill_(group["initial_accumulator_value"])
        return state

    def update(self, batch: Batch, piece: Piece, seed: int | None) -> None:
        group = batch.slots[piece.slot].group
        adagrad_step(
            piece.param, piece.grad, piece.state["sum"],
            lr=float(group["lr"]) / (1 + (int(piece.state["step"]) - 1) * group["lr_decay"]), eps=group["eps"],
            weight_decay=group["weight_decay"], maximize=group["maximize"], grad_scale=batch.grad_scale, out=piece.out,
            seed=seed,
        )  # fmt: skip
