"""Rotary tables out of a model's own rotary module: whatever scaling it has is in its frequencies.

Scalings whose frequencies depend on the length of the text (dynamic, longrope) have one set of them up to the length
that the model was first trained for: such a model is read with that many positions.
Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_inference.errors import ModelError
from ds_kernels import RopeTable

__all__ = ["rope_tables"]


def rope_tables(
    rotary: nn.Module, config: Any, num_layers: int, flags: str | None
) -> tuple[list[RopeTable | None], int]:
    """One table per layer (layers share them), None where a layer has none; and for how many positions they are.

    Raises:
        ModelError: the module has no frequencies that are known how to read.
    """
    types: list[str | None] = [None] * num_layers
    if isinstance(getattr(rotary, "rope_type", None), dict):
        types = list(config.layer_types)
    limit = min(_limit(rotary, config, kind) for kind in set(types))
    tables = {kind: _table(rotary, config, kind, limit) for kind in set(types)}
    used = [True] * num_layers if flags is None else [bool(flag) for flag in getattr(config, flags)]
    return [tables[kind] if use else None for kind, use in zip(types, used, strict=True)], limit


def _parameters(config: Any, kind: str | None) -> dict[str, Any]:
    parameters: dict[str, Any] = config.rope_parameters
    return parameters if kind is None else parameters[kind]


def _limit(rotary: nn.Module, config: Any, kind: str | None) -> int:
    """Positions for which the frequencies are those that the module began with."""
    limit = int(config.max_position_embeddings)
    parameters = _parameters(config, kind)
    if parameters.get("rope_type") == "longrope":
        limit = min(limit, int(parameters["original_max_position_embeddings"]))
    return limit


def _table(rotary: nn.Module, config: Any, kind: str | None, limit: int) -> RopeTable:
    prefix = "" if kind is None else f"{kind}_"
    frequencies = getattr(rotary, f"{prefix}original_inv_freq", None)
    scaling = getattr(rotary, f"{prefix}attention_scaling", None)
    if not isinstance(frequencies, torch.Tensor) or scaling is None or frequencies.dim() != 1:
        raise ModelError(f"{type(rotary).__name__} has no {prefix}original_inv_freq and {prefix}attention_scaling")
    if frequencies.dtype != torch.float32:
        # Casting a model casts this too, which would turn far tokens by wrong angles: built anew, it is in fp32.
        rotary = type(rotary)(config)
        frequencies = getattr(rotary, f"{prefix}original_inv_freq").to(frequencies.device)
    angles = torch.arange(limit, device=frequencies.device, dtype=torch.float32)[:, None] * frequencies
    return RopeTable(angles.cos() * scaling, angles.sin() * scaling)
