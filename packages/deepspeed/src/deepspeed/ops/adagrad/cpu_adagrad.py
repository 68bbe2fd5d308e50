"""Adagrad under upstream's name, on top of torch's fused Adagrad (Duchi et al. 2011); sparse gradients are fine.

s += g^2;  p -= lr * g / (sqrt(s) + eps). State per parameter: `step`, `sum`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepspeed.ops.wrapping import copied_groups, unhooked_step


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """Adagrad for parameters in host memory.

    Args:
        model_params: parameters or a list of parameter-group dicts, for example another optimizer's `param_groups`.
        amsgrad, fp32_optimizer_states, adamw_mode: accepted for upstream's and accelerate's calls; without effect.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        adamw_mode: bool = False,
    ) -> None:
        super().__init__(copied_groups(model_params), lr=lr, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # The fused kernel is dense only; torch's loop takes over in the steps that bring sparse gradients.
            group["fused"] = not any(p.grad is not None and p.grad.is_sparse for p in group["params"])
            group["foreach"] = False
        unhooked_step(torch.optim.Adagrad)(self)
        return loss
