"""Kernels for PyTorch, each with a plain-torch reference as its specification.

This release holds the package's name and version only. The kernels come with later releases: per operation a
reference in plain torch (the specification), a Triton version for GPUs and, where torch's own CPU operation is not at
the memory bandwidth, a numba version.
"""

from __future__ import annotations

from ds_kernels.__about__ import __version__

__all__ = ["__version__"]
