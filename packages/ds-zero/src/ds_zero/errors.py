"""Exceptions of ds_zero. Each is also a builtin, so callers may catch either.

ZeroError(Exception)
 +-- LayoutError(ValueError)            parameters, units or groups that cannot be laid out
 +-- ZeroStateError(RuntimeError)       a call that is illegal in the present state
 +-- NonFiniteGradientError(ArithmeticError)   inf or NaN in a gradient where skipping is not allowed
 +-- CheckpointError(OSError)           a checkpoint that is missing, broken, or of another model
"""

from __future__ import annotations

__all__ = ["CheckpointError", "LayoutError", "NonFiniteGradientError", "ZeroError", "ZeroStateError"]


class ZeroError(Exception):
    """Base of all errors raised by ds_zero on purpose."""


class LayoutError(ZeroError, ValueError):
    """A model, optimizer or unit specification that cannot be laid out; names the parameter."""


class ZeroStateError(ZeroError, RuntimeError):
    """A call that is illegal in the present state (step without backward, nested gather, ...)."""


class NonFiniteGradientError(ZeroError, ArithmeticError):
    """A gradient holds inf or NaN and the configuration does not allow the step to be skipped."""


class CheckpointError(ZeroError, OSError):
    """A checkpoint that is missing, incomplete, corrupt, or written by another model."""
