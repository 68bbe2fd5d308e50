"""Random numbers that do not depend on the split: a seed of its own for each (step, micro-batch, layer).

With `pipeline(..., dropout_seed=s)` every layer of a training forward runs after its device's generator was seeded
with `layer_seed(s, step, micro_batch, layer)`, and the generators are as before when the forward ends. Dropout then
draws the same masks whatever the number of stages, the placement and the schedule; `seeded` does the same for a model
that is not split. A recompute (activation checkpointing) seeds again, so it repeats the forward's masks.

Steps count calls of `train_batch` from 0 (`Pipeline.step`); layers count in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple

import torch

__all__ = ["Seeds", "layer_seed", "seeded"]


class Seeds(NamedTuple):
    """What the seeds of one micro-batch's layers are made of."""

    seed: int
    step: int
    micro_batch: int


def layer_seed(seed: int, step: int, micro_batch: int, layer: int) -> int:
    """The seed of one layer's forward, 0 <= it < 2**63, a hash of the four numbers (any integers below 2**63)."""
    text = f"{seed} {step} {micro_batch} {layer}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def seeded(
    functions: Sequence[Callable[[Any], Any]],
    inputs: Any,
    *,
    seed: int,
    step: int,
    micro_batch: int,
    first_layer: int = 0,
    device: torch.device | str = "cpu",
) -> Any:
    """Run layers one after the other, each seeded as in a pipeline with `dropout_seed=seed`; returns the last's output.

    `functions` are the layers first_layer, first_layer + 1, ... of the model; `device` is where they draw.
    """
    with _preserved(torch.device(device)) as reseed:
        for index, function in enumerate(functions, first_layer):
            reseed(layer_seed(seed, step, micro_batch, index))
            inputs = function(inputs)
    return inputs


@contextmanager
def _preserved(device: torch.device) -> Iterator[Callable[[int], object]]:
    """Gives a function that seeds the generators layers draw from; they are as before afterwards."""
    cpu = torch.default_generator
    before = cpu.get_state()
    if device.type in ("cpu", "meta"):
        try:
            yield cpu.manual_seed
        finally:
            cpu.set_state(before)
        return
    module = torch.get_device_module(device)
    theirs = module.get_rng_state(device)

    def reseed(seed: int) -> None:
        cpu.manual_seed(seed)
        with torch.device(device):
            module.manual_seed(seed)

    try:
        yield reseed
    finally:
        cpu.set_state(before)
        module.set_rng_state(theirs, device)
