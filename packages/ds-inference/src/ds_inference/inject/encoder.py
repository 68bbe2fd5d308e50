"""Encoders of BERT's kind: query, key and value of every attention computed as one product.

The modules stay what and where they are, with their parameters, names and hooks: the three linear layers get a forward
of their own. The first computes the fused product and keeps the other two's parts, which these hand out when they are
asked about the same tensor; asked about another (cross attention), or where gradients of the weights are wanted, each
computes its own product as before. The weights become views of the fused one: no second copy.

Invariant: outputs are those of the separate layers up to the rounding of one matrix product; `revert` gives every
parameter storage of its own again, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ENCODERS", "EncoderLayers", "fuse_attentions", "has_encoder"]

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
"""Model types that injection knows."""
_TRIPLES = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"))


class _Fused:
    """One product for three layers."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)
        self._sizes = [layer.out_features for layer in layers]
        self._weight = _joined([layer.weight for layer in layers])
        self._bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers])
        self._kept: tuple[Tensor, list[Tensor]] | None = None
        for place, layer in enumerate(self.layers):
            layer.forward = _Part(self, place)  # type: ignore[method-assign]

    def part(self, place: int, x: Tensor) -> Tensor:
        layer = self.layers[place]
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
            return _product(x, layer)
        if place == 0:
            parts: list[Tensor] = list(functional.linear(x, self._weight, self._bias).split(self._sizes, -1))
            self._kept = (x, parts)
            return parts[0]
        kept = self._kept
        if kept is None or kept[0] is not x:
            return _product(x, layer)
        if place == len(self.layers) - 1:
            self._kept = None
        return kept[1][place]

    def revert(self) -> None:
        for layer in self.layers:
            del layer.forward
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()
        self._kept = None


class _Part:
    """The forward of one of the three layers. A copy of the layer computes its own product."""

    def __init__(self, fused: _Fused, place: int) -> None:
        self._fused, self._place = fused, place

    def __call__(self, input: Tensor) -> Tensor:
        return self._fused.part(self._place, input)


class EncoderLayers:
    """The attentions of one model whose projections are fused; `names` are theirs."""

    def __init__(self, found: dict[str, list[nn.Linear]]) -> None:
        self.names = list(found)
        self._fused = [_Fused(layers) for layers in found.values()]

    def revert(self) -> None:
        """Give every layer its own forward and weight back."""
        for fused in self._fused:
            fused.revert()
        self._fused.clear()


def has_encoder(model: nn.Module) -> bool:
    """Whether the model is of a known type."""
    return getattr(getattr(model, "config", None), "model_type", None) in ENCODERS


def fuse_attentions(model: nn.Module) -> EncoderLayers:
    """Fuse the projections of every attention in `model` that has three plain linear layers over one input."""
    return EncoderLayers(dict(_attentions(model)))


def _attentions(model: nn.Module) -> list[tuple[str, list[nn.Linear]]]:
    found = []
    for name, module in model.named_modules():
        for triple in _TRIPLES:
            layers = [getattr(module, one, None) for one in triple]
            if all(_is_plain(layer) for layer in layers) and _alike(cast("list[nn.Linear]", layers)):
                found.append((name, cast("list[nn.Linear]", layers)))
    return found


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is nn.Linear and "forward" not in vars(layer) and not layer._forward_hooks
        and not layer._forward_pre_hooks and not layer.weight.is_meta
    )  # fmt: skip


def _alike(layers: Sequence[nn.Linear]) -> bool:
    """Same input, dtype and kind, and nobody else's weight."""
    first = layers[0]
    facts = {(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in layers}
    return len(facts) == 1 and len({id(one.weight) for one in layers}) == len(layers) and first.weight.is_contiguous()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts below one another; they become views of it."""
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([part.shape[0] for part in parts]), strict=True):
        part.data = view
    return whole


def _product(x: Tensor, layer: nn.Linear) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)
