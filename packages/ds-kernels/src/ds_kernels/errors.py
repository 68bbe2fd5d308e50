"""What goes wrong here: a call that no kernel supports, a backend that is missing, a patch that does not fit."""

from __future__ import annotations

__all__ = ["BackendError", "KernelArgumentError", "PatchError"]


class KernelArgumentError(ValueError):
    """An argument that an operation does not support; the text says the value and what is supported."""


class BackendError(RuntimeError):
    """A backend asked for by name that cannot run here; the text says why and what can."""


class PatchError(RuntimeError):
    """A model that cannot be patched, or unpatched, as asked."""
