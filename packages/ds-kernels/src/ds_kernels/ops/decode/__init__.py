"""decode: one new token of each sequence through a whole decoder."""

from __future__ import annotations

from ds_kernels.ops.decode.model import DecodeLayer, DecodeModel, Norm, Projection, RopeTable
from ds_kernels.ops.decode.op import DecodeProgram, bind_decode, decode

__all__ = [
    "DecodeLayer",
    "DecodeModel",
    "DecodeProgram",
    "Norm",
    "Projection",
    "RopeTable",
    "bind_decode",
    "decode",
]
