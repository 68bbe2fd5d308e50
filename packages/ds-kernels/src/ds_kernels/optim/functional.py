"""One optimizer step on flat tensors: `adam_step`, `adagrad_step`, `lion_step`, `sgd_step`, `lamb_step`.

Every function updates in place, on the backend of the tensors' device. All tensors of a call are contiguous, of equal
numel and on one device; any shape counts as flat.
    param       fp32, bf16, fp16 (fp64: everything else but `grad` and `out` must be fp64 as well)
    grad        any float dtype; unchanged
    states      fp32 or bf16
    out         None, or a tensor that gets a copy of the updated parameter in its dtype, in the same pass
    grad_scale  the gradient is multiplied by it first: unscaling and clipping cost no pass of their own
    seed        None, or an integer: bf16 parameters and states are rounded stochastically, by random bits that depend
                on (seed, element) alone, so equal on every backend; give every step and tensor a seed of its own, and
                a part of a tensor `seed_at(seed, index of its first element)`

Arithmetic is in fp32. An element's result depends on nothing but its own inputs: neither on its place in the tensor nor
on threads; a shard computes what the whole tensor would (LAMB's norms apart, which are sums in fp64).

Limit: memory. Bytes per parameter with fp32 everywhere: SGD 12 (momentum 20), Lion 20, Adagrad 20, Adam 28 (amsgrad
36), LAMB 40 in two passes; 16-bit gradients save 2, bf16 states 4 each, `out` adds 2.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import FLOATS, check_device, check_dtype, require
from ds_kernels._dispatch import backend_for

__all__ = [
    "adagrad_step",
    "adam_step",
    "lamb_apply",
    "lamb_moments",
    "lamb_ratio",
    "lamb_step",
    "lion_step",
    "seed_at",
    "sgd_step",
]


def _backend(tensor: Tensor) -> types.ModuleType:
    name = backend_for(tensor)
    if name == "triton" and tensor.dtype != torch.float64:
        from ds_kernels.optim import triton

        return triton
    if name == "cpu":
        from ds_kernels.optim import cpu

        return cpu
    from ds_kernels.optim import reference

    return reference


def _check(op: str, param: Tensor, grad: Tensor | None, out: Tensor | None, **states: Tensor | None) -> None:
    wide = param.dtype == torch.float64
    check_dtype(op, "param", param)
    for name, tensor in {"grad": grad, "out": out, **states}.items():
        if tensor is None:
            continue
        allowed: tuple[torch.dtype, ...] = FLOATS[:2] if name in states else FLOATS[:3]
        if wide:
            allowed = FLOATS[3:] if name in states else FLOATS
        check_dtype(op, name, tensor, allowed)
        require(
            tensor.numel() == param.numel(),
            f"{op}: {name} has {tensor.numel()} elements, param has {param.numel()}; expected equal numbers",
        )
        require(not tensor.is_sparse, f"{op}: {name} is sparse; make it dense first")
        require(tensor.is_contiguous(), f"{op}: {name} with strides {tensor.stride()} is not contiguous")
    require(param.is_contiguous(), f"{op}: param with strides {param.stride()} is not contiguous")
    check_device(op, param, grad=grad, out=out, **states)


def _seed(op: str, seed: int | None) -> int | None:
    require(seed is None or 0 <= seed < 1 << 32, f"{op}: seed is {seed}; expected None or 0 <= seed < 2**32")
    return seed


def seed_at(seed: int, origin: int) -> int:
    """The seed with which the part of a tensor that begins at element `origin` is rounded as within the whole."""
    return (seed + origin * 0x9E3779B9) & 0xFFFFFFFF


def _run(param: Tensor, name: str, *tensors: Tensor | None, **numbers: Any) -> Any:
    if not param.numel():
        return torch.zeros(2, dtype=torch.float64, device=param.device)
    function: Callable[..., Any] = getattr(_backend(param), name)
    return function(*(None if tensor is None else tensor.view(-1) for tensor in tensors), **numbers)


@torch.no_grad()
def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    bias_correction: bool = True,
    max_exp_avg_sq: Tensor | None = None,
    maximize: bool = False,
    grad_scale: float = 1.0,
    out: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Adam or AdamW. Sources: arXiv:1412.6980, arXiv:1711.05101; AMSGrad with `max_exp_avg_sq`: arXiv:1904.09237.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p -= lr m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps), t = `step` from 1;
    weight decay decoupled (p *= 1 - lr wd first) or added to the gradient.
    """
    _check("adam_step", param, grad, out, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, max_exp_avg_sq=max_exp_avg_sq)
    require(step >= 1, f"adam_step: step is {step}; the first step is 1")
    beta1, beta2 = float(betas[0]), float(betas[1])
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    _run(
        param, "adam", param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, out,
        scale=-float(grad_scale) if maximize else float(grad_scale), beta1=beta1, beta2=beta2,
        decay=0.0 if decoupled else float(weight_decay), keep=1.0 - lr * weight_decay if decoupled else 1.0,
        size=lr / first, root=second**-0.5, eps=float(eps), seed=_seed("adam_step", seed),
    )  # fmt: skip


@torch.no_grad()
def adagrad_step(
    param: Tensor,
    grad: Tensor,
    total: Tensor,
    *,
    lr: float = 1e-2,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
    out: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Adagrad (Duchi et al. 2011): s += g^2;  p -= lr g / (sqrt(s) + eps). `total` is s; decay is added to g."""
    _check("adagrad_step", param, grad, out, total=total)
    _run(
        param, "adagrad", param, grad, total, out, scale=-float(grad_scale) if maximize else float(grad_scale),
        decay=float(weight_decay), lr=float(lr), eps=float(eps), seed=_seed("adagrad_step", seed),
    )  # fmt: skip


@torch.no_grad()
def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
    out: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Lion (arXiv:2302.06675): c = b1 m + (1-b1) g;  p = p (1 - lr wd) - lr sign(c);  m = b2 m + (1-b2) g."""
    _check("lion_step", param, grad, out, exp_avg=exp_avg)
    _run(
        param, "lion", param, grad, exp_avg, out, scale=-float(grad_scale) if maximize else float(grad_scale),
        beta1=float(betas[0]), beta2=float(betas[1]), keep=1.0 - lr * weight_decay, lr=float(lr),
        seed=_seed("lion_step", seed),
    )  # fmt: skip


@torch.no_grad()
def sgd_step(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None = None,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
    out: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """SGD with torch's momentum: b = momentum b + (1 - dampening) g;  p -= lr b, or lr (g + momentum b) with nesterov.

    Without `buffer` p -= lr g. At the `first` step b = g, whatever the buffer holds.
    """
    _check("sgd_step", param, grad, out, buffer=buffer)
    require(buffer is not None or momentum == 0, f"sgd_step: momentum is {momentum} but there is no buffer for it")
    _run(
        param, "sgd", param, grad, buffer, out, scale=-float(grad_scale) if maximize else float(grad_scale),
        decay=float(weight_decay), momentum=0.0 if first else float(momentum), rest=1.0 if first else 1.0 - dampening,
        ahead=1.0 if nesterov else 0.0, behind=float(momentum) if nesterov else 1.0, lr=float(lr),
        seed=_seed("sgd_step", seed),
    )  # fmt: skip


def _lamb_numbers(
    step: int, betas: tuple[float, float], eps: float, weight_decay: float, bias_correction: bool, inside: bool
) -> dict[str, float]:
    require(step >= 1, f"lamb_step: step is {step}; the first step is 1")
    first, second = (1 - betas[0] ** step, 1 - betas[1] ** step) if bias_correction else (1.0, 1.0)
    return {
        "size": 1.0 / first,
        "root": second**-0.5,
        "eps": 0.0 if inside else float(eps),
        "inside": float(eps) * second if inside else 0.0,
        "decay": float(weight_decay),
    }


@torch.no_grad()
def lamb_moments(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    grad_scale: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """The first half of LAMB on (a part of) a parameter: Adam's moments.

    Returns:
        fp64 [2]: the sums of squares of the parameter and of the update. Those of a parameter's parts add up to the
        whole parameter's, from which `lamb_ratio` and then `lamb_apply` follow.
    """
    _check("lamb_moments", param, grad, None, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    numbers = _lamb_numbers(step, betas, eps, weight_decay, bias_correction, eps_inside_sqrt)
    sums: Tensor = _run(
        param, "lamb_moments", param, grad, exp_avg, exp_avg_sq, scale=float(grad_scale), beta1=float(betas[0]),
        beta2=float(betas[1]), seed=_seed("lamb_moments", seed), **numbers,
    )  # fmt: skip
    return sums


def lamb_ratio(squares: Tensor, min_coeff: float = 0.01, max_coeff: float = 10.0) -> float:
    """The trust ratio |p| / |u| of sums of squares [2], between the bounds; 1 if either norm is zero."""
    param, update = squares.tolist()
    return float(min(max((param / update) ** 0.5, min_coeff), max_coeff)) if param > 0 and update > 0 else 1.0


@torch.no_grad()
def lamb_apply(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    ratio: float,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    out: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """The second half of LAMB: p -= lr ratio u."""
    _check("lamb_apply", param, None, out, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    numbers = _lamb_numbers(step, betas, eps, weight_decay, bias_correction, eps_inside_sqrt)
    _run(
        param, "lamb_apply", param, exp_avg, exp_avg_sq, out, step=lr * ratio, seed=_seed("lamb_apply", seed), **numbers
    )


def lamb_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    min_coeff: float = 0.01,
    max_coeff: float = 10.0,
    grad_scale: float = 1.0,
    out: Tensor | None = None,
    seed: int | None = None,
    **numbers: Any,
) -> float:
    """LAMB (arXiv:1904.00962) on one whole parameter; returns the trust ratio.

    u = m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + wd p;  p -= lr (|p| / |u|) u, the ratio kept between `min_coeff` and
    `max_coeff`. Further keywords as in `lamb_moments`; `eps_inside_sqrt`: sqrt(v / (1-b2^t) + eps). With bf16 states p
    is updated from the moments as they are stored.
    """
    squares = lamb_moments(param, grad, exp_avg, exp_avg_sq, step=step, grad_scale=grad_scale, seed=seed, **numbers)
    ratio = lamb_ratio(squares, min_coeff, max_coeff)
    lamb_apply(param, exp_avg, exp_avg_sq, step=step, ratio=ratio, lr=lr, out=out, seed=seed, **numbers)
    return ratio
