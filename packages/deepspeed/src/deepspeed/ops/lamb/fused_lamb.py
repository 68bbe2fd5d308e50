"""LAMB under upstream's name, on ds-kernels' (formula and source: `ds_kernels.optim.lamb_step`).

State per parameter: `step`, `exp_avg`, `exp_avg_sq`. Under ZeRO the norms are those of whole parameters at every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from deepspeed.ops.wrapping import copied_groups
from ds_kernels.optim import Batch, Lamb


class FusedLamb(Lamb):
    """LAMB for any device; `get_lamb_coeffs()` are the last step's trust ratios.

    Args:
        max_grad_norm: clip the global gradient norm (0: no clipping). An engine clips itself: `gradient_clipping`.
    Raises:
        RuntimeError: `amsgrad=True`, which LAMB does not have.
    """

    carried: ClassVar[tuple[str, ...]] = (*Lamb.carried, "max_grad_norm", "_clips_here")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedLamb has no AMSGrad variant; leave amsgrad at False")
        super().__init__(
            copied_groups(params), lr, bias_correction, (betas[0], betas[1]), eps, eps_inside_sqrt, weight_decay,
            max_coeff, min_coeff,
        )  # fmt: skip
        self.max_grad_norm = max_grad_norm
        self._clips_here = False

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        grads: Any = None,
        output_params: Any = None,
        scale: float = 1.0,
        grad_norms: Any = None,
    ) -> Any:
        """One step; gradients are divided by `scale`.

        `grads`, `output_params` and `grad_norms` belong to an interface long gone: RuntimeError when one is given.
        """
        if any(given is not None for given in (grads, output_params, grad_norms)):
            raise RuntimeError(
                "FusedLamb.step() takes gradients from the parameters; leave out grads, output_params and grad_norms"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._clips_here = True
        try:
            super().step(grad_scale=self._grad_scale(scale))
        finally:
            self._clips_here = False
        return loss

    def _grad_scale(self, scale: float) -> float:
        """What gradients are multiplied by: unscaled, and their norm within the bound."""
        if self.max_grad_norm <= 0:
            return 1.0 / scale
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) / scale
        return min(1.0, self.max_grad_norm / (norm + 1e-6)) / scale

    def step_pieces(self, batches: Iterable[Batch]) -> None:
        """As ds_zero calls it."""
        if self.max_grad_norm > 0 and not self._clips_here:
            raise RuntimeError(
                f"FusedLamb with max_grad_norm {self.max_grad_norm} inside an engine, which clips itself; set"
                " gradient_clipping in the config and leave max_grad_norm at 0"
            )
        super().step_pieces(batches)
