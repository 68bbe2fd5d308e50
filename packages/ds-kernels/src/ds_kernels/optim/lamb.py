"""LAMB: Adam's direction, scaled per parameter by |p| / |update| (see `functional.lamb_step`).

Two passes over memory, because the ratio needs the norms of the whole parameter first. Of a parameter in pieces each
process sums its own; the sums are in fp64, so how it is cut shows only where an fp64 rounding reaches the ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from ds_kernels._checks import require
from ds_kernels.optim._base import Batch, FlatOptimizer, check_betas, check_rate
from ds_kernels.optim.functional import lamb_apply, lamb_moments, lamb_ratio

__all__ = ["Lamb"]


class Lamb(FlatOptimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962). State per parameter: `step`, `exp_avg`, `exp_avg_sq`.

    Args:
        eps_inside_sqrt: divide by sqrt(v + eps) instead of sqrt(v) + eps.
        min_coeff, max_coeff: bounds of the trust ratio.
    Further keywords: `FlatOptimizer`.
    """

    carried: ClassVar[tuple[str, ...]] = (*FlatOptimizer.carried, "_ratios")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        **storage: Any,
    ) -> None:
        check_rate("Lamb", lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas("Lamb", betas)
        require(
            0 <= min_coeff <= max_coeff,
            f"Lamb: min_coeff is {min_coeff} and max_coeff {max_coeff}; expected 0 <= min_coeff <= max_coeff",
        )
        self._ratios: list[float] = []
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults, **storage)

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("exp_avg", "exp_avg_sq")

    def get_lamb_coeffs(self) -> list[float]:
        """The trust ratios of the last step, one per parameter that was updated, in the order of the update."""
        return list(self._ratios)

    @torch.no_grad()
    def step_pieces(self, batches: Iterable[Batch]) -> None:
        """Moments and norms of a batch, then the norms of all processes together, then the update."""
        self._ratios = []
        for batch in batches:
            self._ratios.extend(self._step_batch(batch))

    def _step_batch(self, batch: Batch) -> list[float]:
        squares = torch.zeros(len(batch.slots), 2, dtype=torch.float64)
        work = []
        for piece in batch.pieces:
            group, state = batch.slots[piece.slot].group, piece.state
            numbers = {
                "step": int(state["step"]),
                "seed": self.seed_of(batch, piece),
                **{key: group[key] for key in ("betas", "eps", "weight_decay", "bias_correction", "eps_inside_sqrt")},
            }
            squares[piece.slot] += lamb_moments(
                piece.param, piece.grad, state["exp_avg"], state["exp_avg_sq"], grad_scale=batch.grad_scale, **numbers
            ).cpu()
            work.append((piece, numbers))
        ratios = [
            lamb_ratio(own, slot.group["min_coeff"], slot.group["max_coeff"])
            for own, slot in zip(batch.sum(squares), batch.slots, strict=True)
        ]
        for piece, numbers in work:
            lr, state = float(batch.slots[piece.slot].group["lr"]), piece.state
            lamb_apply(
                piece.param, state["exp_avg"], state["exp_avg_sq"], ratio=ratios[piece.slot], lr=lr, out=piece.out,
                **numbers,
            )  # fmt: skip
        return ratios
