"""Build a model on a device and in a dtype of choice, without changing its code.

Owns `OnDevice`. Inside the block the default device is `device`, and tensors made by `torch.empty`, `zeros`, `ones`,
`full` (with a float) and the old constructor `torch.Tensor(sizes)` get the dtype `dtype` where they would have been
floating; integer tensors keep their type, and so does what is computed from other tensors. On the meta device a model
of any size is built in no memory.

Invariant: everything is as before after the block, also after an exception; blocks nest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full})


class _FloatingFactories(TorchFunctionMode):
    """Gives `dtype` to the floating results of factory functions, before they are allocated."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __enter__(self) -> _FloatingFactories:
        _nesting.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        _nesting.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # Torch asks all modes, the innermost first: outer ones must not overrule it.
        if self is _nesting[-1] and func in _FACTORIES and self._is_floating(func, args, kwargs):
            kwargs["dtype"] = self.dtype
        return func(*args, **kwargs)

    @staticmethod
    def _is_floating(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kwargs.get("dtype") is not None:
            return bool(kwargs["dtype"].is_floating_point)
        if func is torch.full:  # without a dtype, the type follows the fill value
            return isinstance(kwargs.get("fill_value", args[1] if len(args) > 1 else None), float)
        return True


_nesting: list[_FloatingFactories] = []


class OnDevice:
    """Context: build modules on `device` in `dtype`.

    Args:
        dtype: dtype of floating parameters and buffers; None leaves it.
        device: torch device or its name.
        enabled: False makes the block do nothing.
    """

    def __init__(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "meta", enabled: bool = True
    ) -> None:
        self.dtype, self.device, self.enabled = dtype, torch.device(device), enabled
        self._stack = ExitStack()

    def __enter__(self) -> None:
        if not self.enabled:
            return
        with ExitStack() as stack:
            stack.enter_context(self.device)
            if self.dtype is not None:
                stack.enter_context(_FloatingFactories(self.dtype))
            stack.callback(_replace_tensor_new(self.device, self.dtype))
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def _replace_tensor_new(device: torch.device, dtype: torch.dtype | None) -> Callable[[], None]:
    """Make `torch.Tensor(2, 3)` honour the block: no torch mode sees it. Returns what undoes it."""
    # Random values on meta import it, and it looks at Tensor.__new__ when it is imported: that must be torch's own.
    importlib.import_module("torch._dynamo")
    before = torch.Tensor.__dict__.get("__new__")
    original = torch.Tensor.__new__

    def new(cls: type[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        # Sizes only: `torch.Tensor([1.0])`, `torch.Tensor(other)` and subclasses carry data or a meaning of their own.
        sizes = args and all(isinstance(a, int) for a in args)
        if cls is torch.Tensor and sizes and not kwargs:
            return torch.empty(*args, device=device, dtype=dtype)
        return original(cls, *args, **kwargs)

    def undo() -> None:
        if before is None:
            del torch.Tensor.__new__
        else:
            torch.Tensor.__new__ = before  # type: ignore[method-assign]

    torch.Tensor.__new__ = new  # type: ignore[method-assign,assignment]
    return undo
