"""Ranges in device profiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from deepspeed.accelerator import get_accelerator

P = ParamSpec("P")
R = TypeVar("R")


def instrument_w_nvtx(func: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the calls of `func` appear under its name in a profile of the accelerator (on a CPU: no effect)."""

    @functools.wraps(func)
    def ranged(*args: P.args, **kwargs: P.kwargs) -> R:
        accelerator = get_accelerator()
        accelerator.range_push(func.__qualname__)
        try:
            return func(*args, **kwargs)
        finally:
            accelerator.range_pop()

    return ranged
