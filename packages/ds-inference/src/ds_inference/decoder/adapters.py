"""Low-rank adapters (LoRA, Hu et al. 2021) beside a linear layer: found by what a layer has, not by its class.

    y = x W' + bias,  W' = W + sum over the active adapters of scale * B A

Two kinds are known. PEFT's layers have `base_layer`, and by the adapter's name `lora_A`, `lora_B` and `scaling`; those
of DeepSpeed-Chat have `weight`, `lora_right_weight` [inputs, rank], `lora_left_weight` [rank, outputs] and
`lora_scaling`. What adds something else (magnitudes, biases, variants) is refused with a sentence.

A *fused* weight is computed in fp32 and rounded once, into memory of its own: the layer's own weight is never written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ds_inference.errors import ModelError

__all__ = ["Adapted", "LowRank", "adapted", "adapters_of", "is_chat_layer", "wide"]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """One adapter: `up` [outputs, rank] times `down` [rank, inputs] times `scale`; turned: both are transposed."""

    up: nn.Parameter
    down: nn.Parameter
    scale: float
    turned: bool = False

    def add_to(self, weight: Tensor) -> None:
        """weight [outputs, inputs] += scale * up @ down; in fp32, or fp64 for such a weight."""
        up, down = (part.detach().t() if self.turned else part.detach() for part in (self.up, self.down))
        weight.addmm_(up.to(weight.dtype), down.to(weight.dtype), alpha=self.scale)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A linear layer with adapters: the module that holds weight and bias, and the adapters that are active."""

    base: nn.Module
    low_rank: tuple[LowRank, ...]


def adapted(module: nn.Module) -> Adapted | None:
    """What a linear layer consists of; None: it has no adapter. ModelError: one that does something else as well."""
    if is_chat_layer(module):
        return _of_chat(module)
    if hasattr(module, "base_layer") and hasattr(module, "lora_A") and hasattr(module, "lora_B"):
        return _of_peft(module)
    return None


def adapters_of(model: nn.Module) -> tuple[Any, ...]:
    """What a model's adapters are at this moment: equal to an earlier answer while the same ones are active, alike."""
    found: list[Any] = []
    for name, module in model.named_modules():
        try:
            layer = adapted(module)
        except ModelError as problem:
            found.append((name, str(problem)))
        else:
            if layer is not None:
                found.append((name, tuple((id(pair.up), id(pair.down), pair.scale) for pair in layer.low_rank)))
    return tuple(found)


def is_chat_layer(module: nn.Module) -> bool:
    """Whether this is a layer of DeepSpeed-Chat's kind, which holds weight and adapter itself."""
    return hasattr(module, "lora_right_weight") and hasattr(module, "lora_left_weight")


def _of_chat(layer: Any) -> Adapted:
    if getattr(layer, "fuse_lora", False):  # its weight holds the product already
        return Adapted(layer, ())
    pair = LowRank(layer.lora_left_weight, layer.lora_right_weight, float(layer.lora_scaling), turned=True)
    return Adapted(layer, (pair,))


def _of_peft(layer: Any) -> Adapted:
    if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
        return Adapted(layer.base_layer, ())
    pairs = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        pair = layer.lora_A[name], layer.lora_B[name]
        variants = (getattr(layer, key, ()) for key in ("lora_magnitude_vector", "lora_variant"))
        plain = all(type(part) is nn.Linear and part.bias is None for part in pair)
        if not plain or any(name in named for named in variants):
            raise ModelError(
                f"the adapter {name!r} of a {type(layer).__name__} adds more than a product of two matrices; "
                "expected plain LoRA"
            )
        pairs.append(LowRank(pair[1].weight, pair[0].weight, float(layer.scaling[name])))
    return Adapted(layer.base_layer, tuple(pairs))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a weight of this dtype is fused in."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
