"""Gradients of a pipeline stage: those that are delivered after a backward, and those of weights that stages share.

A *duplicate* is a parameter that several parts of a model hold and keep equal (`part`): the sum over the parts is taken
with `accumulated_gradient` where it is counted, and put into the others with `set_accumulated_gradient`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ds_zero._unit import Unit
from ds_zero.access import full_of_part, part_of_gradient, write_part
from ds_zero.errors import ZeroStateError
from ds_zero.sharded import Place, place_of

__all__ = ["accumulated_gradient", "gathered_units", "set_accumulated_gradient"]


def _placed(parameter: nn.Parameter) -> Place:
    place = place_of(parameter)
    if place is None:
        raise ZeroStateError(f"a parameter of shape {tuple(parameter.shape)} is not of a model that shard() laid out")
    return place


def accumulated_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient since the last step in fp32, full shape: the sum of micro-batches and ranks, or of one their mean.

    To be given to `set_accumulated_gradient` of a duplicate that was accumulated alike. Collective over the ranks that
    share the part. ZeroStateError when there is none.
    """
    place = _placed(parameter)
    full = full_of_part(place, part_of_gradient(place), "accumulated gradient")
    if full is None:
        name = place.unit.layout.slots[place.index].name
        raise ZeroStateError(f"parameter {name!r} has no gradient since the last step; end a micro-batch first")
    return full


def set_accumulated_gradient(parameter: nn.Parameter, total: Tensor) -> None:
    """Replace what was accumulated by `accumulated_gradient()` of the parameter that this one is a duplicate of."""
    place = _placed(parameter)
    write_part(place, part_of_gradient(place), total, "accumulated gradient")


@contextlib.contextmanager
def gathered_units(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, `parameters` have their full shapes and values at every stage, to be read only; no copies are made.

    What delivers gradients outside of a backward through the layers needs it, since autograd compares shapes.
    Collective at stage 3 over transports that copy (not in shared memory).
    """
    with contextlib.ExitStack() as stack:
        for place in _sharded_units(parameters):
            assert place.owner.hooks is not None  # a sharded unit has them
            stack.enter_context(place.owner.hooks.gathered(place.unit))
        yield


def _sharded_units(parameters: Sequence[nn.Parameter]) -> list[Place]:
    """One place per unit whose parameters are sharded, in order of first appearance."""
    found: dict[Unit, Place] = {}
    for parameter in parameters:
        place = place_of(parameter)
        if place is not None and place.unit.sharded and place.owner.hooks is not None:
            found.setdefault(place.unit, place)
    return list(found.values())
