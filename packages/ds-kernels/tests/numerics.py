"""How results are compared: against the specification in fp64, within the rounding that the dtype allows.

A result that is computed in fp32 and rounded once to its dtype is off by half a unit in the last place of its dtype,
plus fp32 rounding of the sums on the way. `assert_accurate` allows exactly that: `ulps * eps(dtype) * |expected|` and
`fp32_terms * eps(fp32) * magnitude`, where magnitude bounds what was summed (by default the largest expected value).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_accurate(
    actual: Tensor,
    expected: Tensor,
    *,
    ulps: float = 1.0,
    fp32_terms: float = 16.0,
    magnitude: Tensor | float | None = None,
    what: str = "result",
) -> None:
    """`actual` is `expected` (fp64) within rounding; NaN and infinity must be in the same places."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.device == expected.device
    expected = expected.double()
    rounded = expected.to(actual.dtype).double()  # overflow to infinity is part of the dtype
    finite = torch.isfinite(rounded)
    assert torch.equal(torch.isnan(actual), torch.isnan(rounded)), f"{what}: NaNs differ"
    assert torch.equal(actual.double()[~finite & ~rounded.isnan()], rounded[~finite & ~rounded.isnan()]), what
    if not finite.any():
        return
    if magnitude is None:
        magnitude = expected[finite].abs().max()
    tiny = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    allowed = (
        ulps * torch.finfo(actual.dtype).eps * expected.abs()
        + fp32_terms * torch.finfo(torch.float32).eps * magnitude
        + tiny
    )
    error = (actual.double() - expected).abs()
    excess = torch.where(finite, error - allowed, torch.zeros_like(error))
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: {int((excess > 0).sum())} of {excess.numel()} elements off; worst at {worst}: "
        f"{actual.flatten()[worst].item()} instead of {expected.flatten()[worst].item()}, "
        f"allowed {allowed.flatten()[worst].item():.3g}"
    )


def wide(value: Any) -> Any:
    """fp64 copy of a float tensor (a leaf with the same requires_grad); anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def check_against(
    op: Callable[..., Tensor], specification: Callable[..., Tensor], *args: Any, **tolerances: Any
) -> None:
    """Forward and every gradient of `op(*args)` against `specification` on the same inputs in fp64 (its autograd)."""
    inputs64 = [wide(argument) for argument in args]
    actual, expected = op(*args), specification(*inputs64)
    assert_accurate(actual.detach(), expected.detach(), what="forward", **tolerances)
    leaves = [(a, b) for a, b in zip(args, inputs64, strict=True) if isinstance(a, Tensor) and a.requires_grad]
    if not leaves:
        return
    grad = torch.randn_like(actual)
    got = torch.autograd.grad(actual, [a for a, _ in leaves], grad)
    wanted = torch.autograd.grad(expected, [b for _, b in leaves], grad.double())
    for index, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert mine.dtype == leaves[index][0].dtype
        assert_accurate(mine, theirs, what=f"gradient {index}", **tolerances)
