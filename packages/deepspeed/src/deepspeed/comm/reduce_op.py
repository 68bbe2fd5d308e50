"""Upstream's path of ReduceOp."""

from ds_comm import ReduceOp

__all__ = ["ReduceOp"]
