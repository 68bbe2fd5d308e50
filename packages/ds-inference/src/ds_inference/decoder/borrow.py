"""Weights that are only lent: those of a model that its owner trains, gathers and releases at will.

The owner's parameters are never moved. A projection of several layers is a *view* over all of their rows where these
lie one after the other in one storage, as the parameters of a flat buffer do, and otherwise a *copy*; so is a weight
that must be turned, or that has low-rank adapters (`adapters`) fused into it. Copies have the values of the moment when
the model was read: after an update it is read anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_inference.decoder.adapters import LowRank, wide

__all__ = ["Borrowing", "Copies", "Rows"]


def _no_hook(hook: Any) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Borrowing:
    """How a lent model is read. `ignores`: which forward hooks are its owner's, and change no result."""

    ignores: Callable[[Any], bool] = _no_hook


@dataclasses.dataclass(frozen=True)
class Rows:
    """One parameter as rows of a projection: a weight [outputs, inputs] (turned: the other way round), or a bias."""

    parameter: nn.Parameter
    turned: bool = False
    low_rank: tuple[LowRank, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """[outputs, inputs], or [outputs]."""
        return self.parameter.t().shape if self.turned else self.parameter.shape

    def write(self, out: Tensor) -> None:
        """Put the present values into `out`."""
        value = self.parameter.detach()
        value = value.t() if self.turned else value
        if not self.low_rank:
            out.copy_(value)
            return
        exact = out if wide(out.dtype) == out.dtype else torch.empty_like(out, dtype=wide(out.dtype))
        exact.copy_(value)
        for pair in self.low_rank:
            pair.add_to(exact)
        if exact is not out:
            out.copy_(exact)


class Copies:
    """The copies of one decoder. Attribute `nbytes`: what they hold."""

    def __init__(self) -> None:
        self.nbytes = 0

    def join(self, parts: Sequence[Rows]) -> Tensor:
        """The parts below one another: a view where that is possible, else a copy."""
        view = _view(parts)
        if view is not None:
            return view
        first = parts[0].parameter
        rows = [part.shape[0] for part in parts]
        joined = torch.empty((sum(rows), *parts[0].shape[1:]), dtype=first.dtype, device=first.device)
        self.nbytes += joined.nbytes
        with torch.no_grad():
            for part, target in zip(parts, joined.split(rows), strict=True):
                part.write(target)
        return joined


def _view(parts: Sequence[Rows]) -> Tensor | None:
    """One tensor over parts that follow one another without a gap; None: they do not."""
    first = parts[0].parameter.detach()
    end = first.data_ptr()
    for part in parts:
        tensor = part.parameter
        if part.turned or part.low_rank or not tensor.is_contiguous() or tensor.data_ptr() != end:
            return None
        if tensor.dtype != first.dtype or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += tensor.numel() * tensor.itemsize
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())
