"""`WeightReader`: takes the parameters out of a model's modules, and knows which ones were taken.

Several linear layers become one *fused* weight whose rows are theirs one after the other; their parameters are then
views of it, so that there is no second copy, and what is written to either is in both. A layer that keeps its weight as
[inputs, outputs] (GPT-2) becomes a transposed view in the same way. Layers that are to be quantised are replaced by
quantised ones, whose codes are views of the fused codes.

Everything is read twice: first *dry* (shapes, names and values are checked, nothing is changed), so that a model that
does not fit is refused as it was; then for good. Peak memory of the second pass is one fused weight beside the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_comm import Communicator
from ds_inference.decoder.adapters import LowRank, adapted, is_chat_layer
from ds_inference.decoder.borrow import Borrowing, Copies, Rows
from ds_inference.decoder.parallel import Parallel
from ds_inference.decoder.quantized import join, quantized_rows, split
from ds_inference.errors import ModelError
from ds_inference.quantization import QuantizationSpec, QuantizedLinear, WeightFormat
from ds_inference.tp.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from ds_kernels import Norm, Projection, QuantizedWeight

__all__ = ["WeightReader", "dtype_of", "inputs_of", "outputs_of"]

_PARALLEL = (ColumnParallelLinear, RowParallelLinear, VocabParallelHead)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """One linear layer: its weight is a parameter (turned: [inputs, outputs]), or quantised; adapters of a lent one."""

    module: nn.Module
    name: str
    weight: nn.Parameter | QuantizedWeight
    turned: bool
    bias: nn.Parameter | None
    low_rank: tuple[LowRank, ...] = ()

    @property
    def outputs(self) -> int:
        return self.weight.shape[1 if self.turned else 0]

    @property
    def dense(self) -> Tensor:
        """[outputs, inputs] of a weight that is not quantised."""
        assert isinstance(self.weight, Tensor)
        return self.weight.detach().t() if self.turned else self.weight.detach()


class WeightReader:
    """Attributes:
    restore: what gives each parameter that is a view of a fused weight its own storage back.
    copies: of a lent model, whose parameters stay where they are.
    activation_bits: of the quantised layers; None: their inputs are as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        quantization: QuantizationSpec | None,
        *,
        dry: bool,
        borrowing: Borrowing | None = None,
    ) -> None:
        self._model = model
        self._borrowing = borrowing
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._taken: set[int] = set()
        self._fused: set[int] = set()
        self._quantization = quantization
        self._dry = dry
        self._communicator: Communicator | None = None
        self._summed: set[int] = set()
        self._first_token: int | None = None
        self._head_sizes: tuple[int, ...] | None = None
        self._formats: set[int | None] = set() if quantization is None else {quantization.activation_bits}
        self.restore: list[Callable[[], None]] = []
        self.copies = Copies()

    def bound(self) -> list[tuple[nn.Module, str, int]]:
        """Where the parameters that were taken are: module, attribute, address of the elements."""
        return [
            (module, key, parameter.data_ptr())
            for module in self._model.modules()
            for key, parameter in module.named_parameters(recurse=False)
            if id(parameter) in self._taken
        ]

    @property
    def parallel(self) -> Parallel | None:
        """Of the tensor-parallel layers that were read; None: there were none, or one rank."""
        if self._communicator is None or self._communicator.size == 1:
            return None
        return Parallel(self._communicator, frozenset(self._summed), self._first_token, self._head_sizes)

    @property
    def activation_bits(self) -> int | None:
        if len(self._formats) > 1:
            raise ModelError("some quantised layers quantise their inputs and some do not; expected the same of all")
        return next(iter(self._formats), None)

    def name(self, module: nn.Module) -> str:
        """The module's name in the model."""
        name: str = self._modules[id(module)]
        return name

    def left_over(self) -> list[str]:
        """Names of the parameters that nothing took."""
        return [name for key, name in self._parameters.items() if key not in self._taken]

    def embedding(self, module: nn.Module) -> Tensor:
        """The weight [tokens, features] of the tokens' embedding, or of this rank's part of it."""
        if not isinstance(module, VocabParallelEmbedding):
            return self.table(module)
        self._check(module, True, "")
        self._communicator, self._first_token = module.communicator, module.first
        return self._take(module, "weight").detach()

    def table(self, module: nn.Module) -> Tensor:
        """The weight of an embedding, [rows, features]."""
        self._check(module, isinstance(module, nn.Embedding), "an Embedding")
        return self._take(module, "weight").detach()

    def norm(self, module: nn.Module, kind: Literal["rms", "layer"], offset: float) -> Norm:
        """A norm with a weight: torch's LayerNorm, or any class whose name says RMSNorm."""
        fits = isinstance(module, nn.LayerNorm) if kind == "layer" else type(module).__name__.endswith("RMSNorm")
        self._check(module, fits, "a LayerNorm" if kind == "layer" else "an RMS norm")
        weight = self._take(module, "weight").detach()
        eps = next((getattr(module, key) for key in ("variance_epsilon", "eps") if hasattr(module, key)), None)
        if not isinstance(eps, float):
            raise ModelError(f"{self.name(module)} is a {type(module).__name__} with eps {eps!r}; expected a number")
        bias = None if getattr(module, "bias", None) is None else self._take(module, "bias").detach()
        return Norm(weight, bias, eps, kind, offset)

    def projection(self, modules: Sequence[nn.Module]) -> Projection:
        """Linear layers over the same input as one."""
        parts = [self._linear(module) for module in modules]
        kinds = {(_kind(part.module), isinstance(part.weight, Tensor)) for part in parts}
        if len(kinds) > 1:
            self._refuse(parts, "are of several kinds")
        form = self._format(parts)
        weight = self._quantised(parts, form) if form or not isinstance(parts[0].weight, Tensor) else self._dense(parts)
        biases = [part.bias for part in parts if part.bias is not None]
        if biases and len(biases) < len(parts):
            self._refuse(parts, "have a bias only in part")
        bias = self._joined([Rows(each) for each in biases]) if biases else None
        projection = Projection(weight, bias)
        first = parts[0].module
        if isinstance(first, RowParallelLinear):
            self._summed.add(id(projection))
        elif isinstance(first, VocabParallelHead):
            self._head_sizes = first.sizes
        if isinstance(first, _PARALLEL):
            self._communicator = first.communicator
        return projection

    def _linear(self, module: nn.Module) -> _Linear:
        found = None if self._borrowing is None else adapted(module)
        low_rank = () if found is None else found.low_rank
        if found is not None:
            self._check(module, True, "")
            self._taken.update(id(parameter) for parameter in module.parameters())
            module = found.base
        kind = type(module) if found is None else _kind(module)
        known = kind in (nn.Linear, QuantizedLinear, *_PARALLEL) or _is_conv1d(module)
        self._check(module, known, "a torch Linear (a layer that was replaced or wrapped cannot be read)")
        bias = None if getattr(module, "bias", None) is None else self._take(module, "bias")
        name = self.name(module)
        if isinstance(module, QuantizedLinear):
            self._formats.add(module.activation_bits)
            return _Linear(module, name, module.quantized, False, bias)
        turned = _is_conv1d(module) or bool(getattr(module, "transposed", False))
        return _Linear(module, name, self._take(module, "weight"), turned, bias, low_rank)

    def _check(self, module: nn.Module, fits: bool, expected: str) -> None:
        name = self.name(module)
        if not fits:
            raise ModelError(f"{name} is a {type(module).__name__}; expected {expected}")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not all(self._borrowing is not None and self._borrowing.ignores(hook) for hook in hooks):
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

    def _refuse(self, parts: Sequence[_Linear], what: str) -> None:
        raise ModelError(f"{', '.join(part.name for part in parts)} {what}; expected the same of all")

    # -- dense weights

    def _dense(self, parts: Sequence[_Linear]) -> Tensor:
        return self._joined(
            [Rows(part.weight, part.turned, part.low_rank) for part in parts if isinstance(part.weight, Tensor)]
        )

    def _joined(self, parts: Sequence[Rows]) -> Tensor:
        """Parts below one another, contiguous; they become views of it unless it is one that fits as it is."""
        first = parts[0].parameter.t() if parts[0].turned else parts[0].parameter
        if len(parts) == 1 and first.is_contiguous() and not parts[0].low_rank:
            return first.detach()
        rows = [part.shape[0] for part in parts]
        shape = (sum(rows), *first.shape[1:])
        if self._borrowing is not None and not self._dry:
            return self.copies.join(parts)
        for part in parts if self._borrowing is None else ():
            if id(part.parameter) in self._fused:
                name = self._parameters[id(part.parameter)]
                raise ModelError(f"{name} is shared by several layers; expected one for each")
            self._fused.add(id(part.parameter))
        if self._dry:
            return torch.empty(shape, dtype=first.dtype, device="meta")
        joined = torch.empty(shape, dtype=first.dtype, device=first.device)
        for part, target in zip(parts, joined.split(rows), strict=True):
            view = target.t() if part.turned else target
            view.copy_(part.parameter.detach())
            part.parameter.data = view
            self.restore.append(_own_data(part.parameter))
        return joined

    # -- quantised weights

    def _format(self, parts: Sequence[_Linear]) -> WeightFormat | None:
        """In which format dense parts are to be held; None: as they are."""
        if self._quantization is None or not isinstance(parts[0].weight, Tensor):
            return None
        form = self._quantization.common([part.name for part in parts])
        for part in parts if form is not None else ():
            if isinstance(part.module, _PARALLEL):
                raise ModelError(
                    f"{part.name} is split over tensor-parallel ranks, where decoders hold no quantised weights; "
                    "leave the quantisation out, or use one rank"
                )
            if self._dry and not all(bool(piece.isfinite().all()) for piece in part.dense.split(1024)):
                raise ModelError(f"{part.name}.weight has infinite or NaN elements and cannot be quantised")
        return form

    def _quantised(self, parts: Sequence[_Linear], form: WeightFormat | None) -> Tensor | QuantizedWeight:
        """The parts as one quantised weight; the layers hold views of it where their rows end with its panels."""
        rows = [part.outputs for part in parts]
        if self._dry:
            first = parts[0].weight
            shape = (sum(rows), (first if isinstance(first, QuantizedWeight) else parts[0].dense).shape[1])
            if isinstance(first, Tensor):
                return torch.empty(shape, dtype=first.dtype, device="meta")
            self._check_formats(parts)
            return dataclasses.replace(first, codes=first.codes.to("meta"), outputs=shape[0])
        each = []
        for part in parts:
            if isinstance(part.weight, QuantizedWeight):
                each.append(part.weight)
            else:
                assert form is not None
                each.append(quantized_rows(part.dense, form))
        joined = join(each)
        views = split(joined, rows) or each
        for part, view in zip(parts, views, strict=True):
            self._put(part, view)
        return joined

    def _check_formats(self, parts: Sequence[_Linear]) -> None:
        weights = [part.weight for part in parts if isinstance(part.weight, QuantizedWeight)]
        formats = {(weight.bits, weight.group_size, weight.centre is None, weight.columns) for weight in weights}
        if len(formats) > 1:
            self._refuse(parts, "are quantised in several ways")

    def _put(self, part: _Linear, weight: QuantizedWeight) -> None:
        """Let the layer compute with this weight."""
        module: Any = part.module
        if not isinstance(module, QuantizedLinear):
            made = QuantizedLinear(weight, part.bias, self.activation_bits)
            made.train(module.training)
            parent, _, child = part.name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, made)
            module = made
        else:
            module.codes, module.scale = weight.codes, weight.scale.view(torch.int16)
            module.centre = None if weight.centre is None else weight.centre.view(torch.int16)
        self.restore.append(_own_codes(module))


def _own_data(parameter: nn.Parameter) -> Callable[[], None]:
    def restore() -> None:
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    return restore


def _own_codes(module: QuantizedLinear) -> Callable[[], None]:
    def restore() -> None:
        module.codes, module.scale = module.codes.clone(), module.scale.clone()
        module.centre = None if module.centre is None else module.centre.clone()

    return restore


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class; that of a layer which holds its adapter itself is what it computes without it."""
    return nn.Linear if is_chat_layer(module) else type(module)


def _is_conv1d(module: nn.Module) -> bool:
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
