"""Quantised weights as parameters: one row of bytes, codes and then fp32 scales.

Being a (frozen) parameter of dtype uint8, such a weight is sharded, saved and loaded by ZeRO as any other, and no cast
of the model to another dtype touches it. `Packing` says how to read the bytes; layers keep it, since ZeRO-3 changes the
class of parameters. Products dequantise in forward and again in backward: nothing dense is kept between them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ds_kernels
from deepspeed.linear.config import QuantizationConfig

__all__ = ["Packing", "QuantizedLinear", "QuantizedParameter"]

_CODES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int4": torch.uint8}


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a [rows, columns] weight of `dtype` is packed into bytes."""

    rows: int
    columns: int
    dtype: torch.dtype
    config: QuantizationConfig

    @property
    def codes_shape(self) -> tuple[int, int]:
        """Bytes of the codes: two of 4 bits share one."""
        return self.rows, math.ceil(self.columns / 2) if self.config.format == "int4" else self.columns

    @property
    def numel(self) -> int:
        """Bytes in all."""
        return math.prod(self.codes_shape) + 4 * self.rows * self._blocks

    @property
    def _blocks(self) -> int:
        return math.ceil(self.columns / self.config.group_size)

    def pack(self, weight: Tensor) -> Tensor:
        """uint8 [numel] of a weight."""
        made = ds_kernels.quantize(weight, self.config.format, block_size=self.config.group_size)
        return torch.cat([made.codes.view(torch.uint8).reshape(-1), made.scale.reshape(-1).view(torch.uint8)])

    def unpack(self, packed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight again, in `dtype` (default: what it was)."""
        codes, scale = packed.detach().split([math.prod(self.codes_shape), 4 * self.rows * self._blocks])
        quantized = ds_kernels.Quantized(
            codes.view(_CODES[self.config.format]).view(self.codes_shape),
            scale.clone().view(torch.float32).view(self.rows, self._blocks),  # a copy, aligned to 4 bytes
            None,
            self.config.format,
            self.config.group_size,
            self.columns,
            self.dtype,
        )
        return quantized.dequantize(dtype)

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., columns] times the weight, in x's dtype (autocast's where it is on); differentiable in x and bias."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _Product.apply(x, packed, self)  # type: ignore[no-untyped-call]
        return out if bias is None else out + bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """x W^T; the backward unpacks W anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        ctx.save_for_backward(packed)
        return F.linear(x, packing.unpack(packed, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return grad[0] @ ctx.packing.unpack(packed, grad[0].dtype), None, None


class QuantizedParameter(nn.Parameter):
    """A frozen weight as bytes, made of the weight [rows, columns]; `dequantized()` gives it back.

    Attributes `packing` and `quantization_config` say how.
    """

    packing: Packing

    def __new__(
        cls,
        data: Tensor,
        requires_grad: bool = False,
        quantization_config: QuantizationConfig | None = None,
        quantizer: Any = None,
    ) -> QuantizedParameter:
        if requires_grad:
            raise ValueError("QuantizedParameter: requires_grad is True, but bytes have no gradient; train an adapter")
        if quantizer is not None:
            raise ValueError("QuantizedParameter: quantizer is ds_kernels.quantize; leave it out")
        if data.dim() != 2 or not data.is_floating_point():
            raise ValueError(
                f"QuantizedParameter: data is {data.dtype} of shape {tuple(data.shape)}; expected a floating matrix"
            )
        rows, columns = data.shape
        packing = Packing(rows, columns, data.dtype, quantization_config or QuantizationConfig())
        made: QuantizedParameter = torch.Tensor._make_subclass(cls, packing.pack(data.detach()), False)
        made.packing = packing
        return made

    @property
    def quantization_config(self) -> QuantizationConfig:
        """The format."""
        return self.packing.config

    def dequantized(self) -> Tensor:
        """The weight [rows, columns] in its dtype."""
        return self.packing.unpack(self)


def frozen_linear(
    input_dim: int, output_dim: int, bias: bool, *, device: Any = None, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias as `nn.Linear` starts with; not by making one, which Init and zero.Init would change."""
    bound = 1 / math.sqrt(input_dim) if input_dim else 0.0
    weight = torch.empty(output_dim, input_dim, device=device, dtype=dtype).uniform_(-bound, bound)
    offset = torch.empty(output_dim, device=device, dtype=dtype).uniform_(-bound, bound) if bias else None
    frozen = nn.Parameter(weight, requires_grad=False)
    return frozen, None if offset is None else nn.Parameter(offset, requires_grad=False)


def quantize_on_load(packing: Packing | None, state_dict: Any, key: str) -> Any:
    """`state_dict`, or where its entry `key` is a dense weight, a copy with the packed one."""
    value = state_dict.get(key)
    if packing is None or value is None or value.shape != (packing.rows, packing.columns):
        return state_dict
    return {**state_dict, key: packing.pack(value.to(packing.dtype))}


class QuantizedLinear(nn.Module):
    """A linear layer with a frozen, quantised weight; loads dense weights as well.

    Args:
        dtype: of the weight before it was quantised, and of the bias.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        quantization_config: QuantizationConfig | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        weight, self.bias = frozen_linear(input_dim, output_dim, bias, dtype=dtype)
        self.weight = QuantizedParameter(weight, quantization_config=quantization_config)
        self.packing = self.weight.packing

    def forward(self, input: Tensor) -> Tensor:
        return self.packing.linear(input, self.weight, self.bias)

    def full_weight(self) -> Tensor:
        """The weight, dequantised."""
        return self.packing.unpack(self.weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(quantize_on_load(self.packing, state_dict, f"{prefix}weight"), prefix, *args)
