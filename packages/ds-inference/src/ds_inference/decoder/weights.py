"""`WeightReader`: takes the parameters out of a model's modules, and knows which ones were taken.

Several linear layers become one *fused* weight whose rows are theirs one after the other; their parameters are then
views of it, so that there is no second copy, and what is written to either is in both. A layer that keeps its weight as
[inputs, outputs] (GPT-2) becomes a transposed view in the same way.

Everything is read twice: first *dry* (shapes and names only, nothing is changed), so that a model that does not fit is
refused as it was; then for good. Peak memory of the second pass is one fused weight beside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ds_inference.errors import ModelError
from ds_kernels import QuantizedWeight
from ds_kernels.ops.decode.model import Norm, Projection

__all__ = ["WeightReader"]


class WeightReader:
    """Attributes:
    moved: the parameters that are views of fused weights now, in groups that share one.
    """

    def __init__(self, model: nn.Module, *, dry: bool) -> None:
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._taken: set[int] = set()
        self._dry = dry
        self.moved: list[list[nn.Parameter]] = []

    def name(self, module: nn.Module) -> str:
        """The module's name in the model."""
        name: str = self._modules[id(module)]
        return name

    def left_over(self) -> list[str]:
        """Names of the parameters that nothing took."""
        return [name for key, name in self._parameters.items() if key not in self._taken]

    def table(self, module: nn.Module) -> Tensor:
        """The weight of an embedding, [rows, features]."""
        self._check(module, isinstance(module, nn.Embedding), "an Embedding")
        return self._take(module, "weight").detach()

    def norm(self, module: nn.Module, kind: Literal["rms", "layer"], offset: float) -> Norm:
        """A norm with a weight: torch's LayerNorm, or any class whose name says RMSNorm."""
        fits = isinstance(module, nn.LayerNorm) if kind == "layer" else type(module).__name__.endswith("RMSNorm")
        self._check(module, fits, "a LayerNorm" if kind == "layer" else "an RMS norm")
        weight = self._take(module, "weight").detach()
        eps = next(getattr(module, key) for key in ("variance_epsilon", "eps") if hasattr(module, key))
        bias = self._take(module, "bias").detach() if getattr(module, "bias", None) is not None else None
        return Norm(weight, bias, float(eps), kind, offset)

    def projection(self, modules: Sequence[nn.Module]) -> Projection:
        """Linear layers over the same input as one."""
        weights = [self._linear(module) for module in modules]
        biases = [getattr(module, "bias", None) for module in modules]
        for module, bias in zip(modules, biases, strict=True):
            if bias is not None:
                self._take(module, "bias")
        transposed = [_is_transposed(module) for module in modules]
        weight = self._fused(weights, transposed)
        if all(bias is None for bias in biases):
            return Projection(weight)
        if len(biases) > 1 and any(bias is None for bias in biases):
            names = ", ".join(self.name(module) for module in modules)
            raise ModelError(f"{names}: some of these layers have a bias and some have none; expected the same of all")
        return Projection(weight, self._fused([bias for bias in biases if bias is not None], [False] * len(biases)))

    def _linear(self, module: nn.Module) -> nn.Parameter:
        fits = type(module) is nn.Linear or _is_transposed(module)
        self._check(module, fits, "a torch Linear (a layer that was replaced or wrapped cannot be read)")
        return self._take(module, "weight")

    def _check(self, module: nn.Module, fits: bool, expected: str) -> None:
        name = self.name(module)
        if not fits:
            raise ModelError(f"{name} is a {type(module).__name__}; expected {expected}")
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(f"{name} has a forward hook, which the decoder would not run; remove the hook first")

    def _take(self, module: nn.Module, key: str) -> nn.Parameter:
        parameter = getattr(module, key, None)
        name = f"{self.name(module)}.{key}"
        if not isinstance(parameter, nn.Parameter):
            raise ModelError(f"{name} is {parameter!r}; expected a parameter")
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device; load the model's weights first")
        self._taken.add(id(parameter))
        return parameter

    def _fused(self, parts: Sequence[nn.Parameter], transposed: Sequence[bool]) -> Tensor:
        """Parts below one another, contiguous; they become views of it unless it is one that fits as it is."""
        first = parts[0].t() if transposed[0] else parts[0]
        if len(parts) == 1 and first.is_contiguous():
            return first.detach()
        rows = [part.shape[1 if turned else 0] for part, turned in zip(parts, transposed, strict=True)]
        shape = (sum(rows), *first.shape[1:])
        if self._dry:
            return torch.empty(shape, dtype=first.dtype, device="meta")
        fused = torch.empty(shape, dtype=first.dtype, device=first.device)
        for part, turned, target in zip(parts, transposed, fused.split(rows), strict=True):
            view = target.t() if turned else target
            view.copy_(part.detach())
            part.data = view
        self.moved.append(list(parts))
        return fused


def _is_transposed(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, whose weight is [inputs, outputs]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def outputs_of(projection: Projection) -> int:
    """Rows of its weight."""
    return projection.weight.shape[0]


def inputs_of(projection: Projection) -> int:
    """Columns of its weight."""
    return projection.weight.shape[1]


def dtype_of(projection: Projection) -> torch.dtype | None:
    """Of a dense weight; None: quantised."""
    return None if isinstance(projection.weight, QuantizedWeight) else projection.weight.dtype
