"""Optimizers and a layer under upstream's import paths. Nothing here is compiled: no op builder, no C++ toolchain."""

from deepspeed._lazy import explain_absent
from deepspeed.ops import adagrad, adam, lamb, lion, transformer
from deepspeed.ops.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

__all__ = [
    "DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer",
    "__compatible_ops__",
    "adagrad",
    "adam",
    "lamb",
    "lion",
    "transformer",
]

# Upstream lists which of its C++/CUDA extensions can be built on this machine. There are none to build.
__compatible_ops__: dict[str, bool] = {}

explain_absent(__name__)
