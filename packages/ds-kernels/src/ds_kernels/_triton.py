"""What every `triton.py` shares: the description of a build, so that tests compile each kernel without a GPU.

Imported only from `triton.py` modules. A build is one specialisation that the launcher can ask for: the kernel, the
types of its arguments, its constants and its tile configuration. `builds()` of each module lists all of them,
autotune spaces included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Build", "next_power_of_2", "type_name"]


@dataclasses.dataclass(frozen=True)
class Build:
    """One specialisation of a kernel to compile ahead of time.

    Attributes:
        kernel: the `@triton.jit` function.
        signature: argument name -> triton type ("*bf16", "i32", "fp32"), constants left out.
        constants: argument name -> value of its `tl.constexpr` arguments.
        num_warps: warps per program.
        num_stages: stages of software pipelining.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()


def type_name(dtype: torch.dtype) -> str:
    """A dtype in triton's words: "bf16", "fp32", "i8"."""
    return {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int8: "i8",
        torch.uint8: "u8",
        torch.int32: "i32",
        torch.int64: "i64",
    }[dtype]
