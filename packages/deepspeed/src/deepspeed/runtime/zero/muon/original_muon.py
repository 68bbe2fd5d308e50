"""Muon under upstream's names, on ds-kernels' (formula and source: `ds_kernels.optim.Muon`).

There is one Muon: alone it steps on this process's matrices, under ZeRO each matrix is orthogonalised on one rank. So
the names with and without "SingleDevice" mean the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ds_kernels import optim

__all__ = [
    "Muon",
    "MuonWithAuxAdam",
    "SingleDeviceMuon",
    "SingleDeviceMuonWithAuxAdam",
    "muon_update",
    "zeropower_via_gram_newtonschulz",
    "zeropower_via_newtonschulz5",
]


def _method(name: str) -> str:
    """Any name but "gram" selects the classic iteration."""
    return "gram" if name == "gram" else "classic"


def zeropower_via_newtonschulz5(G: Tensor, steps: int) -> Tensor:
    """The orthogonal factor of a matrix by the classic Newton-Schulz iteration."""
    return optim.newton_schulz(G, steps, "classic")


def zeropower_via_gram_newtonschulz(G: Tensor, steps: int) -> Tensor:
    """The orthogonal factor of a matrix by Newton-Schulz on its Gram matrix."""
    return optim.newton_schulz(G, steps, "gram")


@torch.no_grad()
def muon_update(
    grad: Tensor,
    momentum: Tensor,
    beta: float = 0.95,
    ns_steps: int = 5,
    nesterov: bool = True,
    ns_method: str = "gram",
    is_expert_group: bool = False,
) -> Tensor:
    """Muon's direction of one gradient; `momentum` is updated in place, `grad` is overwritten.

    Args:
        is_expert_group: the first dimension counts experts, whose matrices are orthogonalised one by one (as any 3-D
            tensor is).
    """
    momentum.lerp_(grad, 1 - beta)
    update = grad.lerp_(momentum, beta) if nesterov else momentum
    if update.dim() > 3:
        update = update.flatten(2 if is_expert_group else 1)
    direction = optim.newton_schulz(update, ns_steps, _method(ns_method))
    return direction.mul_(max(1.0, update.size(-2) / update.size(-1)) ** 0.5)


class Muon(optim.Muon):
    """Muon over matrices."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0,
        momentum: float = 0.95,
        ns_method: str = "gram",
    ) -> None:
        super().__init__(params, lr, weight_decay, momentum, _method(ns_method))


class MuonWithAuxAdam(optim.Muon):
    """Muon for groups with `use_muon=True`, AdamW for groups with `use_muon=False`; each group says which.

    Defaults: lr 0.02, momentum 0.95, weight_decay 0, ns_method "gram"; lr 3e-4, betas (0.9, 0.95), eps 1e-10,
    weight_decay 0.

    Raises:
        ValueError: a group without `use_muon`.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        groups = [dict(group) for group in param_groups]
        for index, group in enumerate(groups):
            if "use_muon" not in group:
                raise ValueError(
                    f"MuonWithAuxAdam: param group {index} has the keys {sorted(group)}; expected use_muon=True (its"
                    " parameters are matrices) or use_muon=False (they are stepped by Adam)"
                )
            if group["use_muon"] and "ns_method" in group:
                group["ns_method"] = _method(group["ns_method"])
        super().__init__(groups)


SingleDeviceMuon = Muon
SingleDeviceMuonWithAuxAdam = MuonWithAuxAdam
