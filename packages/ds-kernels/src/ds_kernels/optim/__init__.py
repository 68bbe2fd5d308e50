"""Optimizers over flat tensors: classes with torch.optim's interface, and single steps as functions (`functional`)."""

from __future__ import annotations

from ds_kernels.optim._base import Batch, FlatOptimizer, Piece, Slot
from ds_kernels.optim.adagrad import Adagrad
from ds_kernels.optim.adam import Adam, AdamW
from ds_kernels.optim.functional import (
    adagrad_step,
    adam_step,
    lamb_apply,
    lamb_moments,
    lamb_ratio,
    lamb_step,
    lion_step,
    seed_at,
    sgd_step,
)
from ds_kernels.optim.lamb import Lamb
from ds_kernels.optim.lion import Lion
from ds_kernels.optim.muon import Muon, newton_schulz
from ds_kernels.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Batch",
    "FlatOptimizer",
    "Lamb",
    "Lion",
    "Muon",
    "Piece",
    "Slot",
    "adagrad_step",
    "adam_step",
    "lamb_apply",
    "lamb_moments",
    "lamb_ratio",
    "lamb_step",
    "lion_step",
    "newton_schulz",
    "seed_at",
    "sgd_step",
]
