"""Inference and serving of PyTorch models that do not fit one device.

This release holds the package's name and version only. The inference engine (dtype, tensor parallelism, weight-only
quantisation) and the serving engine (paged key/value cache, continuous batching) come with later releases.
"""

from __future__ import annotations

from ds_inference.__about__ import __version__

__all__ = ["__version__"]
