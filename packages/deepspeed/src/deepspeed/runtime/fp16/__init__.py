"""Upstream's path of loss scaling (see `loss_scaler.py`)."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, {}, ("loss_scaler",))
