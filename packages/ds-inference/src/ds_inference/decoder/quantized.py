"""Quantised weights that are fused: rows below one another without changing a code.

Codes are packed in panels of 16 rows. Parts of whole panels are laid one after the other, and are views of the result;
others are unpacked and packed anew, since a row's codes and scales do not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_inference.quantization import WeightFormat
from ds_kernels import QuantizedWeight
from ds_kernels.ops.linear.weight import PANEL, pack, unpack

__all__ = ["join", "quantized_rows", "split"]

CHUNK_NUMEL = 1 << 22
"""Elements that are quantised at a time: what it takes in between is several times as large."""


def quantized_rows(weight: Tensor, form: WeightFormat) -> QuantizedWeight:
    """A weight [outputs, inputs] in a format, made piece by piece."""
    step = max(PANEL, CHUNK_NUMEL // weight.shape[1] // PANEL * PANEL)
    return join([form.apply(piece) for piece in weight.split(step)])


def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Parts of one format and equally many columns as one weight, its rows theirs in order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    outputs = sum(part.outputs for part in parts)
    if all(part.outputs % PANEL == 0 for part in parts[:-1]):
        pieces = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale"))
        codes, scale = pieces
        centre = None if first.centre is None else torch.cat([part.centre for part in parts if part.centre is not None])
    else:
        codes = pack(_padded(torch.cat([unpack(part.codes, part.bits)[: part.outputs] for part in parts])), first.bits)
        scale = _panels([part.scale for part in parts], parts)
        centres = [part.centre for part in parts if part.centre is not None]
        centre = _panels(centres, parts) if centres else None
    return dataclasses.replace(first, codes=codes, scale=scale, centre=centre, outputs=outputs)


def split(fused: QuantizedWeight, rows: Sequence[int]) -> list[QuantizedWeight] | None:
    """Views of so many rows each; None where they do not end with panels."""
    if any(count % PANEL for count in rows[:-1]):
        return None
    parts, start = [], 0
    for count in rows:
        panels = slice(start, start + -(-count // PANEL))
        centre = None if fused.centre is None else fused.centre[panels]
        codes, scale = fused.codes[panels], fused.scale[panels]
        parts.append(dataclasses.replace(fused, codes=codes, scale=scale, centre=centre, outputs=count))
        start = panels.stop
    return parts


def _padded(rows: Tensor) -> Tensor:
    missing = -len(rows) % PANEL
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows


def _panels(packed: Sequence[Tensor], parts: Sequence[QuantizedWeight]) -> Tensor:
    """[panels, groups, 16] of the joined rows."""
    rows = torch.cat(
        [each.transpose(1, 2).flatten(0, 1)[: part.outputs] for each, part in zip(packed, parts, strict=True)]
    )
    return _padded(rows).view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()
