"""What the optimizers here share when they sit on top of one of torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch


def copied_groups(params: Iterable[Any]) -> list[Any]:
    """`params` as a list whose group dicts are copies: the optimizer they were taken from keeps its own settings."""
    return [dict(entry) if isinstance(entry, dict) else entry for entry in params]


def unhooked_step(base: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """`base.step` without the wrapper that runs registered step hooks.

    Torch wraps `step` of every class that was instantiated. A subclass that calls its base's `step` would run the
    hooks twice as soon as anyone in the process has made an optimizer of the base class.
    """
    step = base.step
    return cast("Callable[..., Any]", step.__wrapped__ if getattr(step, "hooked", False) else step)  # type: ignore[attr-defined]
