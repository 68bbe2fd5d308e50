"""Weight-only quantisation of linear layers: which layers, in which format, and the layer that holds the codes.

`QuantizationSpec` says, by a module's name, how its weight is held: a `WeightFormat`, or None for as it is. It needs no
calibration data. `quantize_model` replaces the linear layers of any module by `QuantizedLinear`; a decoder asks
`spec.quantize(names, weight)` for its fused weights itself.

Vocabulary: a *group* is as many neighbouring columns of a weight as share a scale; `search` tries narrower ranges of
each group and keeps that of the least squared error. Patterns are regular expressions, searched in module names.

Invariants: rules are tried in order and the first that fits decides; a module that `exclude` finds, or `include` (when
given) does not, stays as it is. Parts of one fused weight have one format, or are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_inference.config import DeepSpeedInferenceConfig
from ds_inference.errors import ConfigError, ModelError
from ds_kernels import QuantizedWeight, linear, quantize_weight

__all__ = ["QuantizationSpec", "QuantizedLinear", "WeightFormat", "quantize_model", "spec_of_config"]

HEAD = r"(^|\.)(lm_head|embed_out)$"
ROUTER = r"(^|\.)(gate|router)$"
"""Layers that choose experts: tiny, and a wrong choice is not a small error."""
QKV = r"(^|[._])(q|k|v|qkv|query|key|value|c_attn|query_key_value|Wqkv)(_?proj)?$"
_GROUP_KEYS = ("num_bits", "group_size", "group_dim", "symmetric")


@dataclass(frozen=True)
class WeightFormat:
    """How one weight is held. ConfigError for what there is not."""

    bits: int = 8
    """8 or 4."""
    group_size: int = 64
    """Columns per scale, a multiple of 32."""
    symmetric: bool = True
    search: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"weights of {self.bits} bits are asked for; expected 8 or 4")
        if self.group_size <= 0 or self.group_size % 32:
            raise ConfigError(f"group_size is {self.group_size}; expected a multiple of 32")

    def apply(self, weight: Tensor) -> QuantizedWeight:
        """The weight [outputs, columns] in this format; ModelError when it has elements that are not finite."""
        try:
            return quantize_weight(
                weight, self.bits, group_size=self.group_size, symmetric=self.symmetric, search=self.search
            )
        except ValueError as error:
            raise ModelError(f"a weight of shape {tuple(weight.shape)} cannot be quantised: {error}") from error


INT8 = WeightFormat(8, 64)
INT4 = WeightFormat(4, 32, symmetric=False, search=True)


@dataclass(frozen=True)
class QuantizationSpec:
    """Which layers are quantised, and how.

    Attributes:
        default: the format of layers that no rule names; None: they stay as they are.
        rules: (pattern, format or None), the first that fits decides.
        include: when given, only layers that one of these patterns finds.
        exclude: never layers that one of these finds.
        activation_bits: 8 quantises what goes into a quantised layer as well, per row and group; None does not.
    """

    default: WeightFormat | None = INT8
    rules: tuple[tuple[str, WeightFormat | None], ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = (ROUTER,)
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.activation_bits not in (None, 8):
            raise ConfigError(f"activation_bits is {self.activation_bits}; expected 8 or None")
        for pattern in (*self.include, *self.exclude, *(pattern for pattern, _ in self.rules)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None

    @classmethod
    def parse(cls, source: QuantizationSpec | str | Mapping[str, Any] | None) -> QuantizationSpec | None:
        """From "int8", "int4", a mapping, a spec, or None.

        A mapping has the keys bits, group_size, symmetric, search, head_bits, include, exclude, activation_bits; what
        is left out is as in the name of those bits.
        """
        if source is None or isinstance(source, QuantizationSpec):
            return source
        if isinstance(source, str):
            bits = {"int8": 8, "int4": 4}.get(source.lower())
            if bits is None:
                raise ConfigError(f"quantization is {source!r}; expected int8, int4, a mapping or a QuantizationSpec")
            return _named(bits)
        return _from_mapping(source)

    def format(self, name: str) -> WeightFormat | None:
        """How the weight of the layer `name` is held; None: as it is."""
        if any(re.search(pattern, name) for pattern in self.exclude):
            return None
        if self.include and not any(re.search(pattern, name) for pattern in self.include):
            return None
        return next((found for pattern, found in self.rules if re.search(pattern, name)), self.default)

    def common(self, names: Sequence[str]) -> WeightFormat | None:
        """The one format of layers that are fused; ModelError when they differ."""
        formats = [self.format(name) for name in names]
        if any(one != formats[0] for one in formats):
            shown = ", ".join(
                f"{name}: {'as it is' if one is None else one}" for name, one in zip(names, formats, strict=True)
            )
            raise ModelError(f"layers that are fused are to be held differently ({shown}); give them one format")
        return formats[0]

    def quantize(self, name: str | Sequence[str], weight: Tensor) -> Tensor | QuantizedWeight:
        """`weight` [outputs, columns] as this spec has it for the layer `name` (several, if fused); or itself."""
        found = self.format(name) if isinstance(name, str) else self.common(name)
        return weight if found is None else found.apply(weight)


def _named(bits: int) -> QuantizationSpec:
    """8 bits are near enough everywhere; of 4-bit models the head stays at 8: it is what each token is chosen by."""
    return QuantizationSpec(INT8) if bits == 8 else QuantizationSpec(INT4, rules=((HEAD, INT8),))


def _from_mapping(source: Mapping[str, Any]) -> QuantizationSpec:
    known = ("bits", "group_size", "symmetric", "search", "head_bits", "include", "exclude", "activation_bits")
    if unknown := sorted(set(source) - set(known)):
        raise ConfigError(f"quantization.{unknown[0]}: unknown key; known: {', '.join(known)}")
    bits = source.get("bits", 8)
    base = {8: INT8, 4: INT4}.get(bits)
    if base is None:
        raise ConfigError(f"quantization.bits is {bits!r}; expected 8 or 4")
    form = WeightFormat(
        bits,
        source.get("group_size", base.group_size),
        source.get("symmetric", base.symmetric),
        source.get("search", base.search),
    )
    head_bits = source.get("head_bits", 8)
    head = form if head_bits == bits else None if head_bits == 16 else WeightFormat(head_bits, 64)
    return QuantizationSpec(
        form,
        rules=() if head == form else ((HEAD, head),),
        include=_patterns(source.get("include", ())),
        exclude=(ROUTER, *_patterns(source.get("exclude", ()))),
        activation_bits=source.get("activation_bits"),
    )


def _patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def spec_of_config(config: DeepSpeedInferenceConfig) -> QuantizationSpec | None:
    """What `dtype=int8` and the `quant` section ask for; None: nothing."""
    asked = "quant" in config.model_fields_set and config.quant.enabled
    if not asked:
        return _named(8) if config.dtype == torch.int8 else None
    weight, activation = config.quant.weight, config.quant.activation
    rules = tuple((re.escape(key), group_format(key, value)) for key, value in weight.post_init_quant.items())
    default = None
    if weight.enabled and (weight.model_fields_set - {"post_init_quant"} or not rules):
        given = weight.quantized_initialization
        default = group_format("quantized_initialization", given) if given else _section_format(config)
    activation_bits = None
    if "activation" in config.quant.model_fields_set and activation.enabled:
        activation_bits = activation.num_bits
    return QuantizationSpec(
        default,
        rules=rules if weight.enabled else (),
        exclude=(ROUTER,) if config.quant.qkv.enabled else (ROUTER, QKV),
        activation_bits=activation_bits,
    )


def spec_of_patterns(patterns: Mapping[str, Mapping[str, Any]]) -> QuantizationSpec:
    """Upstream's {part of a module's name: {num_bits, group_size, group_dim, symmetric}}; nothing else is quantised."""
    rules = tuple((re.escape(key), group_format(key, value)) for key, value in patterns.items())
    return QuantizationSpec(None, rules=rules, exclude=())


def _section_format(config: DeepSpeedInferenceConfig) -> WeightFormat:
    weight = config.quant.weight
    if "q_groups" in weight.model_fields_set and weight.q_groups != 1:
        raise ConfigError(
            f"quant.weight.q_groups is {weight.q_groups}; groups are given by their columns here: leave the key out, "
            "or give quant.weight.quantized_initialization.group_size"
        )
    base = INT4 if weight.num_bits == 4 else INT8
    return WeightFormat(weight.num_bits, base.group_size, weight.q_type == "symmetric", base.search)


def group_format(key: str, given: Mapping[str, Any]) -> WeightFormat:
    """Upstream's {num_bits, group_size, group_dim, symmetric} of one pattern; ConfigError names `key`."""
    if unknown := sorted(set(given) - set(_GROUP_KEYS)):
        raise ConfigError(f"{key}.{unknown[0]}: unknown key; known: {', '.join(_GROUP_KEYS)}")
    if given.get("group_dim", 1) != 1:
        raise ConfigError(f"{key}.group_dim is {given['group_dim']}; groups run along a row here: give 1")
    base = INT4 if given.get("num_bits") == 4 else INT8
    return WeightFormat(
        given.get("num_bits", 8), given.get("group_size", base.group_size), given.get("symmetric", True), base.search
    )


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised, constant weight; gradients go to its input and its bias.

    x [..., in_features] -> [..., out_features], of x's dtype, summed in fp32. Changing the module's dtype changes the
    bias only. `weight` is the dense weight, made anew whenever it is read: for looking, not for computing.
    """

    codes: Tensor
    scale: Tensor
    centre: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, weight: QuantizedWeight, bias: nn.Parameter | None = None, activation_bits: int | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size, self.activation_bits = weight.bits, weight.group_size, activation_bits
        self.register_buffer("codes", weight.codes)
        # As integers, so that no change of the module's dtype rounds them.
        self.register_buffer("scale", weight.scale.view(torch.int16))
        self.register_buffer("centre", None if weight.centre is None else weight.centre.view(torch.int16))
        self.register_parameter("bias", bias)
        self._quantized: QuantizedWeight | None = weight

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as the kernels take it, over the buffers."""
        if self._quantized is None or self._quantized.codes is not self.codes:
            centre = None if self.centre is None else self.centre.view(torch.bfloat16)
            self._quantized = QuantizedWeight(
                self.codes,
                self.scale.view(torch.bfloat16),
                centre,
                self.bits,
                self.group_size,
                self.out_features,
                self.in_features,
            )
        return self._quantized

    @property
    def weight(self) -> Tensor:
        return self.quantized.dequantize(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.quantized, self.bias, activation_bits=self.activation_bits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, activation_bits={self.activation_bits}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_quantized": None}


def quantize_model(model: nn.Module, spec: QuantizationSpec) -> list[str]:
    """Replace the linear layers that `spec` names by quantised ones, one after the other; returns their names.

    nn.Linear, and transformers' Conv1D with its transposed weight; subclasses with a forward of their own stay. A
    layer that is used in several places is quantised once. ModelError, before anything is replaced, when nothing is
    found or a weight cannot be.
    """
    layers: dict[nn.Module, tuple[list[str], WeightFormat]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found = spec.format(name) if name and dense_weight(module) is not None else None
        if found is not None:
            layers.setdefault(module, ([], found))[0].append(name)
    for module, (names, _) in layers.items():
        dense = cast(Tensor, dense_weight(module))
        if dense.is_meta or not all(bool(piece.isfinite().all()) for piece in dense.detach().split(1024)):
            raise ModelError(f"{names[0]}: its weight is not loaded, or has infinite or NaN elements; load it first")
    if not layers:
        raise ModelError(
            f"nothing of {type(model).__name__} is quantised: it has no linear layer that the patterns include; "
            "look at include, exclude and the rules"
        )
    done = []
    while layers:  # letting go of each weight when its codes are made
        module, (names, form) = layers.popitem()
        weight = form.apply(cast(Tensor, dense_weight(module)).detach())
        bias = cast("nn.Parameter | None", getattr(module, "bias", None))
        quantised = QuantizedLinear(weight, bias, spec.activation_bits).train(module.training)
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised)
        done.append(names)
    return [name for names in reversed(done) for name in names]


def dense_weight(module: nn.Module) -> Tensor | None:
    """A linear layer's weight as [outputs, columns]; None for what is none."""
    if type(module) is nn.Linear:
        return module.weight
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), Tensor):
        return weight.t() if weight.dim() == 2 else None
    return None
