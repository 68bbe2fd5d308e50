"""What stands in for a block's `forward`: compiled, recomputed in backward, or both, with all hooks outside.

A *block* is a module that ds_zero gathers as a whole (`ds_zero.block_modules`). Its `forward` becomes an instance
attribute, a `BlockForward`, so that the module's hooks (ZeRO's gathering among them), its name, its parameters and its
class stay what they were; taking the attribute away restores the module. Copies and pickles of a module have its own
`forward` again.

A call goes one of three ways: as it is; through a compiled function; or, where a `Recompute` is set and gradients are
on, through that, which calls either of the two.

Invariants: the result is the module's own; whatever the way, `forward` runs once in forward and at most once more in
backward, between the same gather and release of its unit.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepspeed.utils.logging import warning_once

__all__ = ["BlockForward", "Recompute", "block_forward", "restore_forward"]

Forward = Callable[..., Any]
_VALUES = (Tensor, int, float, complex, str, type(None))


class Recompute(Protocol):
    """How a block is run so that its activations are made again in backward."""

    def __call__(self, block: BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it, by `block.run` or `block.plain`."""


class BlockForward:
    """The `forward` attribute of one block.

    Attributes:
        plain: the module's own forward.
        function: the same, of (module, *args, **kwargs); one object for all blocks of a class.
        own_attribute: the module had a `forward` of its own, beside its class's.
        recompute: None, or how it is recomputed in backward.
        compiler: None, or what makes a compiled function of a function of (module, *args, **kwargs).
        compiles_checkpoints: the compiled function replays random numbers where it recomputes by itself.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.plain: Forward = module.forward
        self.own_attribute = "forward" in module.__dict__
        self.function = _unbound(self.plain, module)
        self.recompute: Recompute | None = None
        self.compiler: Callable[[Forward], Forward] | None = None
        self.compiles_checkpoints = True
        self.__wrapped__ = self.plain  # what inspect.signature shows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recompute = self.recompute
        if recompute is None or not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        return recompute(self, args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward, compiled where that was asked for."""
        if self.compiler is None or not self.compiles(args, kwargs):
            return self.plain(*args, **kwargs)
        return self.compiler(self.function)(self.module, *args, **kwargs)

    def compiles(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call is one to compile: it is not given an object to change, such as a cache of keys."""
        if self.compiler is None:
            return False
        strange = next((v for v in (*args, *kwargs.values()) if not _is_value(v)), None)
        if strange is not None and torch.is_grad_enabled():
            warning_once(
                f"engine.compile(): {type(self.module).__name__} runs uncompiled, because it is given a"
                f" {type(strange).__name__}; for a cache of keys and values, train with use_cache=False"
            )
        return strange is None

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.plain, types.MethodType):
            return types.MethodType, (self.plain.__func__, self.module)
        return functools.partial, (self.plain,)


def _unbound(plain: Forward, module: nn.Module) -> Forward:
    if isinstance(plain, types.MethodType) and plain.__self__ is module:
        return plain.__func__

    def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    return forward


def _is_value(value: Any) -> bool:
    if isinstance(value, _VALUES) or type(value).__module__.startswith("torch."):
        return True
    if isinstance(value, dict):
        return all(_is_value(item) for item in value.values())
    return isinstance(value, (tuple, list)) and all(_is_value(item) for item in value)


def block_forward(module: nn.Module) -> BlockForward:
    """The `BlockForward` of a module; made on the first call."""
    found = module.__dict__.get("forward")
    if isinstance(found, BlockForward):
        return found
    made = module.__dict__["forward"] = BlockForward(module)
    return made


def restore_forward(module: nn.Module) -> None:
    """Give a module its own `forward` back, unless something is still set; no effect on other modules."""
    found = module.__dict__.get("forward")
    if not isinstance(found, BlockForward) or found.compiler is not None or found.recompute is not None:
        return
    if found.own_attribute:
        module.__dict__["forward"] = found.plain
    else:
        del module.__dict__["forward"]
