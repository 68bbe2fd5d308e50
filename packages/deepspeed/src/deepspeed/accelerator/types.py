"""Data types a device computes in, old tensor constructors, and the answers about compiled extensions."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from deepspeed.accelerator.topic import Topic


class TypeTopic(Topic):
    """What a device can compute with."""

    def is_bf16_supported(self) -> bool:
        """Whether bf16 models train on the device."""
        supported = getattr(self.module, "is_bf16_supported", None)
        return bool(supported()) if supported is not None else True

    def is_fp16_supported(self) -> bool:
        """Whether fp16 models train on the device (torch's CPU kernels do, without special instructions too)."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Model dtypes."""
        halves = [torch.half] if self.is_fp16_supported() else []
        brains = [torch.bfloat16] if self.is_bf16_supported() else []
        return [torch.float, *halves, *brains]

    def is_triton_supported(self) -> bool:
        """Whether Triton kernels run on the device."""
        return self._name in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None

    def _constructor(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        return functools.partial(_construct, self._name, dtype)

    @property
    def BFloat16Tensor(self) -> Callable[..., torch.Tensor]:
        """Constructor of bf16 tensors on the device, from sizes or data."""
        return self._constructor(torch.bfloat16)

    @property
    def HalfTensor(self) -> Callable[..., torch.Tensor]:
        """The same for fp16."""
        return self._constructor(torch.half)

    @property
    def FloatTensor(self) -> Callable[..., torch.Tensor]:
        """The same for fp32."""
        return self._constructor(torch.float)

    @property
    def DoubleTensor(self) -> Callable[..., torch.Tensor]:
        """The same for fp64."""
        return self._constructor(torch.double)

    @property
    def ByteTensor(self) -> Callable[..., torch.Tensor]:
        """The same for uint8."""
        return self._constructor(torch.uint8)

    @property
    def IntTensor(self) -> Callable[..., torch.Tensor]:
        """The same for int32."""
        return self._constructor(torch.int32)

    @property
    def LongTensor(self) -> Callable[..., torch.Tensor]:
        """The same for int64."""
        return self._constructor(torch.int64)

    def op_builder_dir(self) -> str:
        """Module of upstream's extension builders; nothing is compiled here, so it names the package of ready ops."""
        return "deepspeed.ops"

    def create_op_builder(self, class_name: str) -> None:
        """None: there is no C++ extension to build under any name; kernels come as Triton or torch code."""

    def get_op_builder(self, class_name: str) -> None:
        """None, as `create_op_builder`."""

    def build_extension(self) -> Any:
        """torch's setuptools command for extensions of the user's own."""
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension


def _construct(device: str, dtype: torch.dtype, *args: Any) -> torch.Tensor:
    """`FloatTensor(2, 3)` is uninitialised of that shape, `FloatTensor([1.0, 2.0])` holds the data."""
    if all(isinstance(arg, int) for arg in args):
        return torch.empty(args or (0,), dtype=dtype, device=device)
    (data,) = args
    return torch.tensor(data, dtype=dtype, device=device)
