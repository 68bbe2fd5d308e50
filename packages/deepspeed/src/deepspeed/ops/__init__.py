"""Optimizers under upstream's import paths. Nothing here is compiled: no op builder, no C++ toolchain."""

from deepspeed.ops import adagrad, adam, lion

__all__ = ["__compatible_ops__", "adagrad", "adam", "lion"]

# Upstream lists which of its C++/CUDA extensions can be built on this machine. There are none to build.
__compatible_ops__: dict[str, bool] = {}
