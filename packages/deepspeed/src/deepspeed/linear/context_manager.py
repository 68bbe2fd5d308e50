"""Models built of `OptimizedLinear`: `Init` while they are built and loaded, then `init_lora`.

with deepspeed.linear.Init(lora_config=LoRAConfig(), quant_config=QuantizationConfig()):
    model = AutoModelForCausalLM.from_pretrained(...)      # dense, frozen weights are loaded
deepspeed.linear.init_lora(model)                          # quantised, with adapters
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deepspeed.linear.config import LoRAConfig, QuantizationConfig
from deepspeed.linear.optimized_linear import LoRAOptimizedLinear, OptimizedLinear
from deepspeed.utils.logging import log_dist

__all__ = ["Init", "init_lora"]


@contextlib.contextmanager
def Init(lora_config: LoRAConfig | None = None, quant_config: QuantizationConfig | None = None) -> Iterator[None]:
    """Inside, `torch.nn.Linear(...)` makes `OptimizedLinear`s; adapters wait for `init_lora`.

    Layers have the dtype that they ask for (default: torch's default dtype).
    """
    delayed = None if lora_config is None else dataclasses.replace(lora_config, delay_lora_init=True)
    plain = nn.Linear

    class Either(type):
        """Code that looks for linear layers, to initialise their weights, finds those that have dense ones."""

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (plain, LoRAOptimizedLinear))

    class Linear(plain, metaclass=Either):  # type: ignore[misc, valid-type]
        """`torch.nn.Linear` inside of Init. Classes derived from it are what they always are."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _optimized(plain, delayed, quant_config, *args, **kwargs) if cls is Linear else super().__new__(cls)

    nn.Linear = Linear  # type: ignore[misc]
    try:
        yield
    finally:
        nn.Linear = plain  # type: ignore[misc]


def _optimized(
    plain: type[nn.Module],
    lora_config: LoRAConfig | None,
    quant_config: QuantizationConfig | None,
    in_features: int,
    out_features: int,
    bias: bool = True,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """What `torch.nn.Linear(in_features, ...)` makes inside of Init."""
    dtype = dtype or torch.get_default_dtype()
    return OptimizedLinear(
        in_features, out_features, bias, lora_config, quant_config, device=device, dtype=dtype, linear_cls=plain
    )


def init_lora(model: nn.Module) -> None:
    """Give the layers named in `target_mods` adapters, and make the others frozen linear layers, quantised if so
    configured. If no layer bears such a name, all of them get adapters, which is logged. Call it before
    `deepspeed.initialize`."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRAOptimizedLinear)}
    chosen = {name for name, layer in layers.items() if name.rpartition(".")[2] in layer.lora_config.target_mods}
    if layers and not chosen:
        chosen = set(layers)
        log_dist(
            f"init_lora: no layer is named as in LoRAConfig.target_mods, so all {len(layers)} get adapters, first"
            f" {next(iter(layers))!r}",
            ranks=[0],
        )
    for name, layer in layers.items():
        layer.init_lora() if name in chosen else layer.disable()
