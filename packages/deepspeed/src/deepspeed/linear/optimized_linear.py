"""`OptimizedLinear`: a linear layer, quantised or not, with LoRA adapters or not.

    y = x W^T + lora_alpha / lora_r * (x A^T) B^T       W ("weight") is frozen; A and B are `lora_weight_1` and `_2`

Invariant: W's bits never change. `fuse_lora` makes a dense sum beside them, `unfuse_lora` drops it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import Linear  # nn.Linear may be Init's

from deepspeed.linear.config import LoRAConfig, QuantizationConfig
from deepspeed.linear.quantization import (
    Packing,
    QuantizedLinear,
    QuantizedParameter,
    frozen_linear,
    quantize_on_load,
)
from deepspeed.utils.logging import warning_once
from ds_zero import GatheredParameters

__all__ = ["LoRAOptimizedLinear", "OptimizedLinear", "QuantizedLinear", "QuantizedParameter"]


class OptimizedLinear(nn.Module):
    """Makes the layer that the configs ask for: `LoRAOptimizedLinear`, `QuantizedLinear`, or a `linear_cls`.

    Args:
        input_dim, output_dim, bias: as `nn.Linear`'s; a bias is frozen with the weight.
        lora_config: adapters; None for none. quantization_config: of the frozen weight; None leaves it dense.
        device, dtype: of the weights, before they are quantised.
        linear_cls: the class of a layer without either config.
    """

    def __new__(  # type: ignore[misc]  # the layer is what was asked for, as upstream's
        cls,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        lora_config: LoRAConfig | None = None,
        quantization_config: QuantizationConfig | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        linear_cls: type[nn.Module] = Linear,
    ) -> nn.Module:
        if lora_config is not None:
            return LoRAOptimizedLinear(
                input_dim, output_dim, bias, lora_config, quantization_config, device=device, dtype=dtype
            )
        if quantization_config is not None:
            layer = QuantizedLinear(input_dim, output_dim, bias, quantization_config, dtype=dtype)
            return layer if device is None else layer.to(device)
        return linear_cls(input_dim, output_dim, bias=bias, device=device, dtype=dtype)


class LoRAOptimizedLinear(nn.Module):
    """A frozen linear layer with trainable adapters.

    Attributes:
        weight: [output_dim, input_dim], or its bytes once quantised. lora_weight_1, lora_weight_2: A and B.
        disabled: the layer has no adapters and gets none (`disable`).
        lora_scaling_factor: lora_alpha / lora_r.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        lora_config: LoRAConfig | None = None,
        quantization_config: QuantizationConfig | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        linear_cls: type[nn.Module] = Linear,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.lora_config = lora_config or LoRAConfig()
        self.quantization_config = quantization_config
        self.linear_cls = linear_cls
        self.lora_scaling_factor = self.lora_config.lora_alpha / self.lora_config.lora_r
        self.disabled = False
        self._initialized = False
        self._packing: Packing | None = None
        self._fused: Tensor | None = None
        self.weight, self.bias = frozen_linear(input_dim, output_dim, bias, device=device, dtype=dtype)
        self.weight.ds_optim_param = True  # type: ignore[attr-defined]  # upstream's mark
        if self.lora_config.base_weight_sharding > 1 or self.lora_config.offload:
            warning_once("LoRAConfig: base_weight_sharding and offload have no effect; ZeRO-3 shards frozen weights")
        if not self.lora_config.delay_lora_init:
            self.init_lora()

    # -- adapters ------------------------------------------------------------------------------------------------

    def init_lora(self) -> None:
        """Quantise the weight if so configured, and add the adapters; B is zero, so outputs do not change.

        Call it before `deepspeed.initialize`; again, or after `disable`, it does nothing.
        """
        if self._initialized or self.disabled:
            return
        self._initialized = True
        self._quantize()
        rank, like = self.lora_config.lora_r, {"device": self.weight.device, "dtype": self._dtype}
        self.lora_weight_1 = self.linear_cls(self.input_dim, rank, bias=False, **like)
        self.lora_weight_2 = self.linear_cls(rank, self.output_dim, bias=False, **like)
        nn.init.zeros_(self.lora_weight_2.weight)  # type: ignore[arg-type]

    def disable(self) -> None:
        """No adapters: a frozen linear layer, quantised if so configured."""
        self.disabled = True
        if not self._initialized:
            self._quantize()

    def _quantize(self) -> None:
        if self.quantization_config is None or self._packing is not None:
            return
        with self._whole(self.weight):
            made = QuantizedParameter(self.weight, quantization_config=self.quantization_config)
        self.weight, self._packing = made, made.packing

    @property
    def _dtype(self) -> torch.dtype:
        return self.weight.dtype if self._packing is None else self._packing.dtype

    @staticmethod
    def _whole(*parameters: nn.Parameter) -> contextlib.AbstractContextManager[None]:
        """Inside, they are there at every stage."""
        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        return GatheredParameters(sharded, enabled=bool(sharded))

    def full_weight(self) -> Tensor:
        """The frozen weight [output_dim, input_dim], dequantised; collective at ZeRO-3."""
        with self._whole(self.weight):
            return self._base().clone()

    def _base(self) -> Tensor:
        return self.weight.detach() if self._packing is None else self._packing.unpack(self.weight)

    def fuse_lora(self) -> None:
        """Make W + scale * B A, dense, which forward then uses: for generation. Collective at ZeRO-3.

        Adapters get no gradient until `unfuse_lora`.
        """
        if self._fused is not None or not self._trains:
            return
        first, second = self.lora_weight_1.weight, self.lora_weight_2.weight
        assert isinstance(first, nn.Parameter) and isinstance(second, nn.Parameter)  # layers have them
        with self._whole(self.weight, first, second), torch.no_grad():
            product = second.float() @ first.float()
            self._fused = (self._base().float() + self.lora_scaling_factor * product).to(self._dtype)

    def unfuse_lora(self) -> None:
        """Forget the sum."""
        self._fused = None

    @property
    def _trains(self) -> bool:
        return self._initialized and not self.disabled

    # -- forward, loading ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if not self._initialized and not self.disabled:
            raise RuntimeError(
                "this layer was made with delay_lora_init: call deepspeed.linear.init_lora(model) once the weights are"
                " loaded, or layer.disable()"
            )
        if self._fused is not None:
            return F.linear(x, self._fused, self.bias)
        if self._packing is None:
            out = F.linear(x, self.weight, self.bias)
        else:
            out = self._packing.linear(x, self.weight, self.bias)
        if self._trains:
            out = out + self.lora_scaling_factor * self.lora_weight_2(self.lora_weight_1(x))
        return out

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(quantize_on_load(self._packing, state_dict, f"{prefix}weight"), prefix, *args)

    def extra_repr(self) -> str:
        shape = f"in_features={self.input_dim}, out_features={self.output_dim}, bias={self.bias is not None}"
        return shape + ("" if self._packing is None else f", format={self._packing.config.format}")
