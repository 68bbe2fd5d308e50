"""`ParameterOffload`: how clients of upstream switch off the gathering of ZeRO-3 while they generate.

They take the hooks out of the optimizer's `parameter_offload` and put them back afterwards (trl's `remove_hooks` and
`add_hooks`, and code like it): they go through `module`, `forward_hooks`, `backward_hooks` and
`_register_deepspeed_module`. Here the hooks stay; removing "them" gathers the whole model instead, so that forwards
communicate nothing until they are back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["ParameterOffload"]


class _Removable:
    """Stands for all hooks of a model."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


class ParameterOffload:
    """One sharded model's.

    Attributes:
        module: the model. forward_hooks, backward_hooks: what can be removed; they are replaced by clients.
    """

    def __init__(self, module: nn.Module, gather: Callable[[], None], release: Callable[[], None]) -> None:
        self.module = module
        self._gather, self._release = gather, release
        self.forward_hooks: list[Any] = [_Removable(gather)]
        self.backward_hooks: list[Any] = []
        module.__dict__.setdefault("ds_external_parameters", _no_parameters)

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        """Put the hooks back."""
        self._release()
        self.forward_hooks = [_Removable(self._gather)]


def _no_parameters() -> list[tuple[str, nn.Parameter]]:
    """External parameters of a model beside its own, which are all there are."""
    return []
