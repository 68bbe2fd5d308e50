"""What to change when a run does not fit: variants of the config, each planned again, the least first.

A variant is a set of keys with new values. It is worth telling if it lowers the peak; the first that
fits is the advice.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.config.translate import zero_config
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.planner.plan import Plan, plan_run

__all__ = ["Variant", "advise"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Keys to set, and the peak with them."""

    keys: Mapping[str, Any]
    peak_nbytes: int
    fits: bool

    @property
    def text(self) -> str:
        """`key = value` of each key."""
        return ", ".join(f"{key} = {value!r}" for key, value in self.keys.items())


def advise(plan: Plan, device_memory: int) -> list[Variant]:
    """Variants that need less than `plan`, up to and including the first that fits in `device_memory` bytes.

    Single changes come first, then all of them that helped together. Empty if the plan fits, or if nothing helps.
    """
    if plan.fits(device_memory):
        return []
    found: list[Variant] = []
    joined: dict[str, Any] = {}
    for keys in _changes(plan):
        variant = _planned(plan, keys, device_memory)
        if variant is None or variant.peak_nbytes >= plan.peak_nbytes:
            continue
        found.append(variant)
        if variant.fits:
            return found
        joined |= keys
    if len(found) > 1:
        together = _planned(plan, joined, device_memory)
        if together is not None and together.peak_nbytes < min(v.peak_nbytes for v in found):
            found.append(together)
    return found


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Candidates in the order in which one would try them: layouts first, since they change no result."""
    config, held = plan.config, plan.forecast.peak.held
    stage = config.zero_optimization.stage
    if plan.world > 1:
        if stage < 2:
            yield {"zero_optimization.stage": 2}
        if stage < 3:
            yield {"zero_optimization.stage": 3}
    largest = max((u.padded_numel for u in plan.forecast.shard_map.units), default=0)
    if config.zero_optimization.reduce_bucket_size > largest // 4 and held.get("buffers", 0) > plan.peak_nbytes // 20:
        yield {"zero_optimization.reduce_bucket_size": max(largest // 4, 1)}
    if stage == 3 and plan.device != "cpu" and zero_config(config).prefetch_bucket_size:
        yield {"zero_optimization.stage3_prefetch_bucket_size": 0}
    micro, steps = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    while micro > 1 and micro % 2 == 0:
        micro, steps = micro // 2, steps * 2
        yield {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    if config.model_dtype == "fp32":
        yield {"bf16.enabled": True}


def _planned(plan: Plan, keys: Mapping[str, Any], device_memory: int) -> Variant | None:
    """The variant; None if the config refuses it."""
    raw = copy.deepcopy(dict(plan.config.raw))
    for path, value in keys.items():
        block = raw
        *parents, name = path.split(".")
        for parent in parents:
            if not isinstance(block.get(parent), dict):
                block[parent] = {}
            block = block[parent]
        block[name] = value
    try:
        again = plan_run(plan.workload, raw, world=plan.world, device=plan.device)
    except DeepSpeedConfigError:
        return None
    return Variant(dict(keys), again.peak_nbytes, again.fits(device_memory))
