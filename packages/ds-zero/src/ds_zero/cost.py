"""What a layout costs, from the shard map alone: bytes per rank and traffic per step. Pure: no ranks, no tensors.

The laws, with P elements (padding counted: each unit is a multiple of ranks x ALIGNMENT) and N ranks, for bf16
parameters, fp32 masters and Adam (Rajbhandari et al. 2020, "ZeRO"):

    memory in bytes     stage 0: 2P + 2P + 12P   1, 2: 2P + (2P + 12P)/N   3: (2P + 2P + 12P)/N
    wire per rank       stages 0-2: 2P(N-1)/N elements per step            3: 3P(N-1)/N

Stage 1 keeps no full gradient, so it needs no more memory than stage 2. On top come the units in flight (gathered at
stage 3) and the gradient windows. Every figure is asserted equal to the live tensors and to the ledger by the tests.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

from ds_zero.layout import ShardMap, UnitLayout
from ds_zero.shard import stage_parts

__all__ = ["MemoryCost", "StepCost", "memory_per_rank", "traffic_per_step"]

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MASTER_NBYTES = 4


@dataclasses.dataclass(frozen=True)
class MemoryCost:
    """Bytes that one rank holds between steps (`gradients`: between backward and step)."""

    parameters: int
    masters: int
    """fp32 copies; none for fp32 parameters, which are their own master."""
    optimizer: int
    gradients: int
    largest_unit: int
    """Full parameters of the largest unit that is gathered and released (stage 3); 0 where nothing is."""

    @property
    def total(self) -> int:
        """Everything but the units in flight."""
        return self.parameters + self.masters + self.optimizer + self.gradients


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Traffic of one rank in one optimizer step.

    Each unit is used once per micro-batch, forward and backward, and fits one bucket. A unit of several uses (a tied
    embedding) is gathered for each; a frozen one that no gradient passes through has no backward, so one gather less.
    """

    calls: dict[str, int]
    """Collectives by op."""
    wire_elements: int
    """Elements sent per rank on a ring, parameters and gradients (a whole number: units are padded)."""
    scalar_wire_elements: float
    """The same for the global norm."""
    nbytes: int
    """Bytes of all messages, each counted whole, the norm included."""
    wire_nbytes: float
    """Bytes sent per rank on a ring, the norm included."""


def memory_per_rank(
    shard_map: ShardMap,
    stage: int,
    *,
    rank: int = 0,
    num_states: int | Mapping[int, int] = 2,
    accumulates: bool = False,
) -> MemoryCost:
    """Bytes per rank.

    Args:
        num_states: optimizer values per element (Adam 2, AMSGrad 3, SGD with momentum 1), or those of each group.
        accumulates: gradients are summed over micro-batches, in fp32.
    """
    parts = stage_parts(stage)
    parameters = masters = optimizer = gradients = largest = 0
    for unit in shard_map.units:
        size = ITEMSIZE[unit.dtype]
        sharded = parts.params and not unit.persistent
        parameters += size * (unit.shard_numel if sharded else unit.padded_numel)
        largest = max(largest, size * unit.padded_numel) if sharded else largest
        if not unit.trainable:
            continue
        start, stop = shard_map.state_range(unit, rank)
        masters += MASTER_NBYTES * (stop - start) if unit.dtype != "float32" else 0
        for segment in unit.segments(start, stop):
            states = num_states if isinstance(num_states, int) else num_states[segment.group]
            optimizer += MASTER_NBYTES * states * segment.numel
        gradients += (MASTER_NBYTES if accumulates else size) * (stop - start)
    return MemoryCost(parameters, masters, optimizer, gradients, largest)


def traffic_per_step(shard_map: ShardMap, stage: int, *, micro_batches: int = 1) -> StepCost:
    """Collectives, ring traffic and bytes of one step (a forward and backward per micro-batch, then the update)."""
    parts, size = stage_parts(stage), shard_map.num_shards
    calls: collections.Counter[str] = collections.Counter()
    wire = nbytes = wire_nbytes = 0

    def add(op: str, unit: UnitLayout, times: int) -> None:
        nonlocal wire, nbytes, wire_nbytes
        calls[op] += times
        nbytes += times * unit.padded_numel * ITEMSIZE[unit.dtype]
        sent = times * (2 if op == "all_reduce" else 1) * unit.shard_numel * (size - 1)
        wire += sent
        wire_nbytes += sent * ITEMSIZE[unit.dtype]

    for unit in shard_map.units:
        sharded = parts.params and not unit.persistent
        if sharded:
            add("all_gather", unit, 2 * micro_batches)  # before its forward, and again before its backward
        if not unit.trainable:
            continue
        add("reduce_scatter" if parts.state else "all_reduce", unit, micro_batches)
        if parts.state and not sharded:
            add("all_gather", unit, 1)  # publish
    if parts.state:
        calls["all_reduce"] += 1  # the norm, one fp64 number
        nbytes += 8
    scalars = 2 * (size - 1) / size if parts.state else 0.0
    return StepCost(dict(calls), wire, scalars, nbytes, wire_nbytes + 8 * scalars)
