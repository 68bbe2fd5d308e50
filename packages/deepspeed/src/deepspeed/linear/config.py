"""What an optimized linear layer is made of."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["LoRAConfig", "QuantizationConfig"]

FORMATS = {(8, 3): "fp8_e4m3", (8, 2): "fp8_e5m2", (4, 1): "int4"}
"""(q_bits, mantissa_bits) -> format of ds_kernels.quantize."""


@dataclasses.dataclass
class LoRAConfig:
    """Hu et al. 2021, "LoRA" (arXiv:2106.09685): y = W x + lora_alpha / lora_r * B A x, of which A and B are trained.

    Attributes:
        lora_r: rows of A. lora_alpha: numerator of the factor.
        base_weight_sharding: no effect: ZeRO-3 shards frozen weights over all its ranks.
        offload, offload_ratio: no effect: frozen weights stay on the model's device.
        delay_lora_init: make the adapters (and quantise) when `init_lora()` is called.
        target_mods: layers that `deepspeed.linear.init_lora(model)` gives adapters to, by the last part of their name.
    """

    lora_r: int = 64
    lora_alpha: float = 16.0
    base_weight_sharding: int = 1
    offload: bool = False
    offload_ratio: float = 0.0
    delay_lora_init: bool = False
    target_mods: list[str] = dataclasses.field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"LoRAConfig: lora_r is {self.lora_r}; expected a positive number of rows")


@dataclasses.dataclass
class QuantizationConfig:
    """Format of a frozen weight.

    Attributes:
        q_bits, mantissa_bits: 8 and 3 (fp8 e4m3), 8 and 2 (fp8 e5m2), or 4 (integers of 4 bits, whatever the mantissa).
        group_size: elements of a row that share a scale, an even number.
        q_dtype: of the stored bytes, torch.uint8.
    """

    q_bits: int = 8
    mantissa_bits: int = 3
    group_size: int = 512
    q_dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if self.format not in FORMATS.values():
            raise ValueError(
                f"QuantizationConfig: q_bits {self.q_bits} with mantissa_bits {self.mantissa_bits} is not a format of"
                " ds_kernels.quantize; use q_bits 8 with mantissa_bits 3 or 2, or q_bits 4"
            )
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"QuantizationConfig: group_size is {self.group_size}; expected a positive, even number")
        if self.q_dtype is not torch.uint8:
            raise ValueError(f"QuantizationConfig: q_dtype is {self.q_dtype}; only torch.uint8 is there")

    @property
    def format(self) -> str:
        """The name of ds_kernels.quantize's format; "" if there is none."""
        return FORMATS.get((self.q_bits, 1 if self.q_bits == 4 else self.mantissa_bits), "")
