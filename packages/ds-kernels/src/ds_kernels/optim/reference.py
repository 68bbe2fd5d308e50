"""The optimizers' update formulas in plain torch: the specification.

All tensors of a call are flat, of one length and on one device, and are updated in place. Arithmetic is in fp32 (fp64
if the parameters are fp64), each operation rounded by itself, so that an element's bits depend neither on where it
lies nor on its neighbours; results are rounded to their tensor's dtype once, to nearest even or stochastically.

Numbers that the formulas share:
    scale   multiplies the gradient first (unscaling, clipping; negative to maximise)
    decay   L2: added to the gradient as decay * p
    keep    decoupled weight decay: p is multiplied by keep = 1 - lr * weight_decay
    seed    None: round to nearest. Else round what is bf16 stochastically (see `round_to`)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adagrad", "adam", "lamb_apply", "lamb_moments", "lion", "round_to", "sgd"]


def _wide(tensor: Tensor, param: Tensor) -> Tensor:
    return tensor.to(torch.float64 if param.dtype == torch.float64 else torch.float32)


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value * factor


def random_bits(numel: int, seed: int, first: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements from `first` on: a hash of seed and index, the same on every backend.

    The finaliser is "lowbias32" of C. Wellons' hash prospector.
    """
    mask = 0xFFFFFFFF
    h = torch.arange(first, first + numel, dtype=torch.int64, device=device)
    h = (h * 0x9E3779B9 + seed) & mask
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
    h = ((h ^ (h >> 15)) * 0x846CA68B) & mask
    return (h ^ (h >> 16)) & 0xFFFF


def round_to(out: Tensor, value: Tensor, seed: int | None, first: int = 0) -> None:
    """out = value, rounded to nearest; or up with the probability of its distance, if out is bf16 and there is a seed.

    Args:
        first: index of the first element, so that a tensor may be worked through in parts.
    """
    if seed is None or out.dtype != torch.bfloat16 or not value.numel():
        out.copy_(value)
        return
    bits = value.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = (bits + random_bits(value.numel(), seed, first, value.device)) & 0xFFFF0000
    signed = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32)
    out.copy_(torch.where(value.isnan(), value.float(), signed.view(torch.float32)))


def _stream(seed: int | None, stream: int) -> int | None:
    return None if seed is None else (seed + stream) & 0xFFFFFFFF


def _publish(param: Tensor, value: Tensor, out: Tensor | None, seed: int | None, first: int) -> None:
    round_to(param, value, seed, first)
    if out is not None:
        out.copy_(value)


def adam(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None, out: Tensor | None,
    *, scale: float, beta1: float, beta2: float, decay: float, keep: float, size: float, root: float, eps: float,
    seed: int | None, first: int = 0,
) -> None:  # fmt: skip
    """m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p = keep p - size m / (root sqrt(v) + eps)."""
    p, g = _wide(param, param), _times(_wide(grad, param), scale)
    if decay:
        g = g + p * decay
    m = _wide(exp_avg, param) * beta1 + g * (1 - beta1)
    v = _wide(exp_avg_sq, param) * beta2 + (g * (1 - beta2)) * g
    round_to(exp_avg, m, _stream(seed, 1), first)
    round_to(exp_avg_sq, v, _stream(seed, 2), first)
    if max_exp_avg_sq is not None:
        v = torch.maximum(_wide(max_exp_avg_sq, param), v)
        round_to(max_exp_avg_sq, v, _stream(seed, 3), first)
    value = _times(p, keep) - (m * size) / (v.sqrt() * root + eps)
    _publish(param, value, out, seed, first)


def adagrad(
    param: Tensor, grad: Tensor, total: Tensor, out: Tensor | None,
    *, scale: float, decay: float, lr: float, eps: float, seed: int | None, first: int = 0,
) -> None:  # fmt: skip
    """s = s + g^2;  p = p - lr g / (sqrt(s) + eps)."""
    p, g = _wide(param, param), _times(_wide(grad, param), scale)
    if decay:
        g = g + p * decay
    s = _wide(total, param) + g * g
    round_to(total, s, _stream(seed, 1), first)
    _publish(param, p - (g * lr) / (s.sqrt() + eps), out, seed, first)


def lion(
    param: Tensor, grad: Tensor, exp_avg: Tensor, out: Tensor | None,
    *, scale: float, beta1: float, beta2: float, keep: float, lr: float, seed: int | None, first: int = 0,
) -> None:  # fmt: skip
    """c = b1 m + (1-b1) g;  p = keep p - lr sign(c);  m = b2 m + (1-b2) g. The sign of NaN is 0."""
    p, g, m = _wide(param, param), _times(_wide(grad, param), scale), _wide(exp_avg, param)
    c = m * beta1 + g * (1 - beta1)
    sign = (c > 0).to(p.dtype) - (c < 0).to(p.dtype)
    round_to(exp_avg, m * beta2 + g * (1 - beta2), _stream(seed, 1), first)
    _publish(param, _times(p, keep) - sign * lr, out, seed, first)


def sgd(
    param: Tensor, grad: Tensor, buffer: Tensor | None, out: Tensor | None,
    *, scale: float, decay: float, momentum: float, rest: float, ahead: float, behind: float, lr: float,
    seed: int | None, first: int = 0,
) -> None:  # fmt: skip
    """b = momentum b + rest g;  p = p - lr (ahead g + behind b). Without a buffer p = p - lr g."""
    p, g = _wide(param, param), _times(_wide(grad, param), scale)
    if decay:
        g = g + p * decay
    if buffer is not None:
        b = _wide(buffer, param) * momentum + g * rest
        round_to(buffer, b, _stream(seed, 1), first)
        g = g * ahead + b * behind if ahead else _times(b, behind)
    _publish(param, p - g * lr, out, seed, first)


def _direction(
    p: Tensor, m: Tensor, v: Tensor, size: float, root: float, eps: float, inside: float, decay: float
) -> Tensor:
    return (m * size) / ((v + inside).sqrt() * root + eps) + p * decay


def lamb_moments(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    *, scale: float, beta1: float, beta2: float, size: float, root: float, eps: float, inside: float, decay: float,
    seed: int | None, first: int = 0,
) -> Tensor:  # fmt: skip
    """Adam's moments; returns fp64 [2]: sums of the squares of p and of the update u (see `lamb_apply`)."""
    p, g = _wide(param, param), _times(_wide(grad, param), scale)
    m = _wide(exp_avg, param) * beta1 + g * (1 - beta1)
    v = _wide(exp_avg_sq, param) * beta2 + (g * (1 - beta2)) * g
    round_to(exp_avg, m, _stream(seed, 1), first)
    round_to(exp_avg_sq, v, _stream(seed, 2), first)
    u = _direction(p, m, v, size, root, eps, inside, decay)
    return torch.stack([p.double().square().sum(), u.double().square().sum()])


def lamb_apply(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, out: Tensor | None,
    *, step: float, size: float, root: float, eps: float, inside: float, decay: float,
    seed: int | None, first: int = 0,
) -> None:  # fmt: skip
    """u = size m / (root sqrt(v + inside) + eps) + decay p;  p = p - step u."""
    p = _wide(param, param)
    u = _direction(p, _wide(exp_avg, param), _wide(exp_avg_sq, param), size, root, eps, inside, decay)
    _publish(param, p - u * step, out, seed, first)
