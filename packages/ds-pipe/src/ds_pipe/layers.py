"""Layers that are described now and built later, on the stage that holds them.

A `LayerSpec` is a class with its arguments; a stage of a `PipelineModule` builds only its own. Layers with the same
`key` of `TiedLayerSpec` share one module on each stage that has any of them, and the weights in `tied_weight_attr` are
kept equal between those stages. Names and semantics are upstream's (`deepspeed.pipe`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["LayerSpec", "TiedLayerSpec"]


class LayerSpec:
    """`typename(*args, **kwargs)`, built by `build()`. TypeError when `typename` is no `nn.Module` class."""

    def __init__(self, typename: type[nn.Module], *args: Any, **kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise TypeError(f"LayerSpec of {typename!r}; expected a class derived from torch.nn.Module")
        self.typename = typename
        self.module_args = args
        self.module_kwargs = kwargs

    def build(self) -> nn.Module:
        """A new module, on torch's default device."""
        return self.typename(*self.module_args, **self.module_kwargs)

    def __repr__(self) -> str:
        given = [repr(arg) for arg in self.module_args]
        given += [f"{name}={value!r}" for name, value in self.module_kwargs.items()]
        return f"{self.typename.__name__}({', '.join(given)})"


class TiedLayerSpec(LayerSpec):
    """A layer whose module is shared with all layers of the same `key`.

    `forward_fn(module, inputs)` replaces the module's own forward for this use (an embedding used as the head).
    `tied_weight_attr` names the parameters that stay equal between stages, with dots for nested ones.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **kwargs: Any,
    ) -> None:
        super().__init__(typename, *args, **kwargs)
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)
