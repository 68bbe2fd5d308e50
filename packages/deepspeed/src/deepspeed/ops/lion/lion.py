"""Lion (Chen et al. 2023, arXiv:2302.06675), in plain torch.

c = b1 m + (1-b1) g;  p = p (1 - lr wd) - lr sign(c);  m = b2 m + (1-b2) g. State per parameter: `exp_avg`.
The sign makes the update exact in any dtype; only the moment is rounded, which is why it is fp32 by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepspeed.ops.wrapping import copied_groups


class _Lion(torch.optim.Optimizer):
    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float, fp32_states: bool
    ) -> None:
        if lr < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr is {lr} and betas are {betas}; expected lr >= 0 and betas in [0, 1)")
        self.fp32_optimizer_states = fp32_states
        super().__init__(copied_groups(params), {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    dtype = torch.float32 if self.fp32_optimizer_states else p.dtype
                    state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
                momentum = state["exp_avg"]
                grad = p.grad.to(momentum.dtype)
                direction = momentum.lerp(grad, 1 - beta1).sign_().to(p.dtype)
                p.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
                momentum.lerp_(grad, 1 - beta2)
        return loss


class DeepSpeedCPULion(_Lion):
    """Lion for parameters in host memory; `fp32_optimizer_states=False` keeps the moment in the parameters' dtype."""

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(model_params, lr, betas, weight_decay, fp32_optimizer_states)


class FusedLion(_Lion):
    """Lion for parameters on an accelerator; `set_grad_none` is the default of `zero_grad`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        self.set_grad_none = set_grad_none
        super().__init__(params, lr, betas, weight_decay, False)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget gradients; by default as `set_grad_none` says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)
