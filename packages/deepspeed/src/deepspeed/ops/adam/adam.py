"""Adam under upstream's names, on top of torch's fused Adam.

Owns `DeepSpeedCPUAdam` and `FusedAdam`: upstream's signatures over one class, which is `torch.optim.Adam` with
`fused=True`, the fastest Adam there is on a CPU and on a GPU. State per parameter: `step`, `exp_avg`, `exp_avg_sq`.

With m, v the moments, b1, b2 the betas, t the step:
    m = b1 m + (1-b1) g;   v = b2 v + (1-b2) g^2;   p -= lr * [m / (1-b1^t)] / (sqrt(v / (1-b2^t)) + eps)
and weight decay decoupled (`adamw_mode`, p *= 1 - lr*wd first) or as L2 (g += wd*p). Sources: Kingma & Ba 2015,
arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.

Invariant: what the fused kernel cannot do (no bias correction; fp32 moments for 16-bit parameters) is ds-kernels'
`adam_step`, the formula above in fp32, tensor by tensor; all else is torch's kernel and has its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch.optim.adam import Adam

from deepspeed.ops.wrapping import copied_groups, unhooked_step
from ds_kernels.optim import adam_step


class _FusedTorchAdam(Adam):
    steps_as_torch_adam = True
    """On flat fp32 masters a step is torch's fused kernel; ds_zero may drive it directly."""
    carried: ClassVar[tuple[str, ...]] = ("_settings", "fp32_optimizer_states")
    """Attributes of its own that a copy or a pickle takes along."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        bias_correction: bool,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adamw_mode: bool,
        amsgrad: bool,
        fp32_states: bool,
    ) -> None:
        self._settings = {
            "bias_correction": bias_correction,
            "decoupled_weight_decay": adamw_mode,
            "fused": True,
            "foreach": False,
        }
        self.fp32_optimizer_states = fp32_states
        super().__init__(
            copied_groups(params),
            lr=lr,
            betas=(betas[0], betas[1]),
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            fused=True,
            decoupled_weight_decay=adamw_mode,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. The mode of this optimizer wins over what a group of another optimizer carries."""
        super().add_param_group(param_group | self._settings)

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, which takes along groups and states and nothing of a subclass; with what is `carried`."""
        state: dict[str, Any] = super().__getstate__()
        return state | {name: getattr(self, name) for name in self.carried}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            for name, value in self._settings.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all groups; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held_back = [(p, p.grad) for group in self.param_groups for p in group["params"] if self._is_plain(group, p)]
        for p, _ in held_back:
            p.grad = None
        try:
            unhooked_step(Adam)(self)
        finally:
            for p, grad in held_back:
                p.grad = grad
        for group in self.param_groups:
            for p in group["params"]:
                if self._is_plain(group, p):
                    self._plain_step(group, p)
        return loss

    def _is_plain(self, group: dict[str, Any], p: torch.Tensor) -> bool:
        mixed = self.fp32_optimizer_states and p.dtype in (torch.bfloat16, torch.float16)
        return p.grad is not None and (mixed or not group["bias_correction"])

    def _plain_step(self, group: dict[str, Any], p: torch.Tensor) -> None:
        state = self.state[p]
        if not state:
            half = torch.float32 if self.fp32_optimizer_states or p.dtype == torch.float16 else p.dtype
            moment = torch.zeros_like(
                p, dtype=p.dtype if p.dtype == torch.float64 else half, memory_format=torch.contiguous_format
            )
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = moment
            state["exp_avg_sq"] = torch.zeros_like(moment)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(moment)
        state["step"] += 1
        value, flat = p.detach().contiguous(), cast(torch.Tensor, p.grad).contiguous()
        adam_step(
            value, flat, state["exp_avg"], state["exp_avg_sq"], step=int(state["step"]), lr=float(group["lr"]),
            betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"], bias_correction=group["bias_correction"],
            max_exp_avg_sq=state["max_exp_avg_sq"] if group["amsgrad"] else None,
        )  # fmt: skip
        if value.data_ptr() != p.data_ptr():
            p.copy_(value)


class DeepSpeedCPUAdam(_FusedTorchAdam):
    """Adam(W) for parameters in host memory (other devices work too).

    Args:
        model_params: parameters or a list of parameter-group dicts, for example another optimizer's `param_groups`.
        bias_correction: False leaves out the division by 1 - beta^t.
        adamw_mode: decoupled weight decay; False adds it to the gradient.
        fp32_optimizer_states: moments of 16-bit parameters in fp32; False keeps them in the parameters' dtype.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(
            model_params, lr, bias_correction, betas, eps, weight_decay, adamw_mode, amsgrad, fp32_optimizer_states
        )


class FusedAdam(_FusedTorchAdam):
    """Adam(W) for parameters on an accelerator (a CPU works too); moments in the parameters' dtype.

    Raises:
        RuntimeError: `amsgrad=True`, which upstream's FusedAdam does not have; DeepSpeedCPUAdam and torch's have it.
    """

    carried: ClassVar[tuple[str, ...]] = (*_FusedTorchAdam.carried, "set_grad_none")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam has no AMSGrad variant; use torch.optim.AdamW(amsgrad=True, fused=True)")
        self.set_grad_none = set_grad_none
        super().__init__(params, lr, bias_correction, betas, eps, weight_decay, adam_w_mode, False, False)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget gradients; by default as `set_grad_none` says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: Any = None,
        output_params: Any = None,
        scale: Any = None,
        grad_norms: Any = None,
        grad_scaler: Any = None,
    ) -> Any:
        """One step. All arguments after `closure` belong to an interface long gone: RuntimeError when one is given."""
        if any(given is not None for given in (grads, output_params, scale, grad_norms, grad_scaler)):
            raise RuntimeError(
                "FusedAdam.step() takes gradients from the parameters and nothing else; leave out grads, "
                "output_params, scale, grad_norms and grad_scaler (loss scaling is done by the engine)"
            )
        return super().step(closure)
