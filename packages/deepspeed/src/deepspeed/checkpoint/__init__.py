"""Upstream's package of checkpoint helpers; modules are imported on first use."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, {}, ("utils",))
