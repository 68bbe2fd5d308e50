"""`Op`: one operation as autograd and `torch.compile` see it.

The same four pieces (implementation, fake, what to save, backward) serve three ways to call:
    no gradient wanted   the implementation itself: no more than a Python call in front of the kernel
    eager autograd       a `torch.autograd.Function` (a custom op's own autograd costs twice its overhead)
    torch.compile        a `torch.library` custom op `ds_kernels::<name>`: opaque to the compiler, no graph break

A backward pass is an `Op` of its own without a backward: it is traceable where the forward is. Gradients of gradients
are not offered and raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Op"]


class Op:
    """An operation over tensors, callable with the positional arguments of its schema."""

    def __init__(
        self,
        schema: str,
        forward: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
        mutates: tuple[str, ...] = (),
    ) -> None:
        """Define an operation.

        Args:
            schema: `name(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)`, in the language of torch.library.
            forward: implementation; returns new tensors that alias no input.
            fake: like forward on tensors without data: empty tensors of the right shapes, dtypes and strides.
            setup_context: `(ctx, inputs, output)`: saves for backward what it needs.
            backward: `(ctx, *grads)`: one gradient or None per input.
            mutates: arguments that it writes to, marked in the schema as `Tensor(a!) cache`.
        """
        name, self._forward = schema.partition("(")[0], forward
        self.__name__ = name
        custom = torch.library.custom_op(
            f"ds_kernels::{name}", forward, mutates_args=mutates, schema=schema.removeprefix(name)
        )
        custom.register_fake(fake)
        self._function: Any = None
        if backward is not None:
            custom.register_autograd(backward, setup_context=setup_context)
            self._function = _autograd_function(name, forward, setup_context, backward)
        self.overload: Any = getattr(torch.ops.ds_kernels, name).default

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if (
            self._function is not None
            and torch.is_grad_enabled()
            and any(isinstance(argument, Tensor) and argument.requires_grad for argument in args)
        ):
            return self._function.apply(*args)
        return self._forward(*args)


def _autograd_function(
    name: str,
    forward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None,
    backward: Callable[..., Any],
) -> Any:
    """The eager twin of a custom op's autograd formula."""

    def run(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(run), "backward": staticmethod(once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), members)
