"""`apply_kernels`: the operations of this package put into Hugging Face models, in place, and taken out again."""

from __future__ import annotations

from ds_kernels.patch.apply import Applied, apply_kernels

__all__ = ["Applied", "apply_kernels"]
