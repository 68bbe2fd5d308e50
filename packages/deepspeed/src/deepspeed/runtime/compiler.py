"""Upstream's path of what it asks torch.compile about."""

from __future__ import annotations

import torch
from torch.compiler import disable, is_compiling

from deepspeed._lazy import explain_absent

__all__ = ["disable", "is_compile_supported", "is_compiling"]


def is_compile_supported() -> bool:
    """Whether this torch can compile modules."""
    return hasattr(torch, "compile")


explain_absent(__name__)
