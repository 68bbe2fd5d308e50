"""decode: one new token of each sequence through a whole decoder."""

from __future__ import annotations

from ds_kernels.ops.decode.composed import Composition
from ds_kernels.ops.decode.model import DecodeLayer, DecodeModel, Norm, Projection, RopeTable
from ds_kernels.ops.decode.op import DecodeProgram, bind_decode, decode
from ds_kernels.ops.decode.steps import NewTokens

__all__ = [
    "Composition",
    "DecodeLayer",
    "DecodeModel",
    "DecodeProgram",
    "NewTokens",
    "Norm",
    "Projection",
    "RopeTable",
    "bind_decode",
    "decode",
]
