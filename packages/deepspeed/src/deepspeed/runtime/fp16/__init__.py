"""Upstream's path of loss scaling (see `loss_scaler.py`)."""
