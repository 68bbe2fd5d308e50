"""Lion under upstream's names, on ds-kernels' (formula and source: `ds_kernels.optim.lion_step`).

State per parameter: `step`, `exp_avg`. The sign makes the update exact in any dtype; only the moment is rounded, which
is why it is fp32 by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from deepspeed.ops.wrapping import copied_groups
from ds_kernels.optim import Lion


class _Lion(Lion):
    carried: ClassVar[tuple[str, ...]] = (*Lion.carried, "fp32_optimizer_states")

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float, fp32_states: bool
    ) -> None:
        self.fp32_optimizer_states = fp32_states
        super().__init__(copied_groups(params), lr, (betas[0], betas[1]), weight_decay)

    def dtype_of_state(self, parameter: torch.Tensor) -> torch.dtype:
        """fp32, or bf16 for bf16 parameters where that was asked for."""
        if not self.fp32_optimizer_states and parameter.dtype == torch.bfloat16:
            return torch.bfloat16
        return super().dtype_of_state(parameter)


class DeepSpeedCPULion(_Lion):
    """Lion for parameters in host memory; `fp32_optimizer_states=False` keeps bf16 parameters' moment in bf16."""

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

    carried: ClassVar[tuple[str, ...]] = (*_Lion.carried, "set_grad_none")

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
