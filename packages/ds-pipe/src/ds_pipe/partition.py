"""Layers -> stages: contiguous splits that provably minimise the heaviest stage.

A split of n items into p parts is its bounds (0 = b0 < b1 < .. < bp = n): part j holds items b[j] .. b[j + 1] - 1, and
no part is empty. The weight of a part is the sum of its items plus the part's fixed `extra` (an embedding, a head).

`balanced` first finds the least possible maximum by dynamic programming over prefixes: best[j][i] is the least over the
last bound h of max(best[j - 1][h], weight(h, i) + extra[j]). Parts heavier than a split already in hand cannot help
and are never looked at, which leaves about n/p bounds per cell. Among the splits that reach this maximum, a second pass
of the same shape takes the one with the least sum of squares of the parts, that is the most even one; of equals the
one whose bounds are smallest, read from the last. Weights are put on a common integer scale (floats are exact
fractions), so that no rounding decides.
Source: linear partitioning, e.g. Pinar and Aykanat, J. Parallel Distrib. Comput. 64 (2004).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from math import isfinite, lcm

from ds_pipe.errors import PartitionError

__all__ = ["balanced", "partition_layers", "uniform"]

Weight = float | Fraction
Bounds = tuple[int, ...]


def uniform(num_items: int, num_parts: int) -> Bounds:
    """Parts of equal count; the first `num_items % num_parts` have one more. PartitionError for too few items."""
    _check_counts(num_items, num_parts)
    size, larger = divmod(num_items, num_parts)
    return tuple(part * size + min(part, larger) for part in range(num_parts + 1))


def balanced(weights: Sequence[Weight], num_parts: int, *, extra: Sequence[Weight] | None = None) -> Bounds:
    """The contiguous split into `num_parts` non-empty parts whose heaviest part is as light as possible.

    `weights` are per item and not negative, in any unit; `extra` (len `num_parts`, default 0) is added to each part.
    Deterministic: see the module for ties. PartitionError for fewer items than parts or a bad weight.
    """
    _check_counts(len(weights), num_parts)
    extra = (0,) * num_parts if extra is None else extra
    if len(extra) != num_parts:
        raise PartitionError(f"extra has {len(extra)} entries; expected {num_parts}, one per part")
    scaled = _integers([*weights, *extra])
    fixed = scaled[len(weights) :]
    prefix = [0, *accumulate(scaled[: len(weights)])]
    cap = _heaviest(prefix, fixed, _first_guess(prefix, num_parts))
    fewest = _search(prefix, fixed, cap, max)
    return _search(prefix, fixed, _heaviest(prefix, fixed, fewest), lambda best, part: best + part * part)


def partition_layers(
    method: str,
    num_stages: int,
    *,
    names: Sequence[str] | None = None,
    parameters: Sequence[int] | None = None,
    costs: Sequence[Weight] | None = None,
    extra: Sequence[Weight] | None = None,
) -> Bounds:
    """Split layers by the name of a method, as `PipelineModule(partition_method=...)` takes it (case-insensitive).

    "uniform": equal counts.  "parameters": by `parameters`, numbers of trainable parameters.  "type:REGEX": equal
    counts of the layers whose class name (in `names`) the regular expression finds, ignoring case.  "profile": by
    `costs`, measured seconds per layer; `extra` is the fixed cost per stage. What the method does not need may be None.
    """
    known = method.lower()
    if known == "uniform":
        given = next((found for found in (names, parameters, costs) if found is not None), None)
        return uniform(len(_given(given, method, "names, parameters or costs")), num_stages)
    if known == "parameters":
        return balanced(_given(parameters, method, "parameters"), num_stages)
    if known == "profile":
        return balanced(_given(costs, method, "costs"), num_stages, extra=extra)
    if known.startswith("type:"):
        layers = _given(names, method, "names")
        pattern = method.partition(":")[2]
        found = [1 if re.search(pattern, name, re.IGNORECASE) else 0 for name in layers]
        if sum(found) < num_stages:
            raise PartitionError(
                f"partition method {method!r} finds {sum(found)} of {len(layers)} layers; expected at least one per "
                f"stage ({num_stages}); the layers are {', '.join(sorted(set(layers)))}"
            )
        return balanced(found, num_stages)
    raise PartitionError(
        f"partition method {method!r} is unknown; expected 'uniform', 'parameters', 'type:REGEX' or 'profile'"
    )


def _given(value: Sequence[Weight] | Sequence[str] | None, method: str, name: str) -> Sequence:  # type: ignore[type-arg]
    if value is None:
        raise PartitionError(f"partition method {method!r} needs {name}, which was not given")
    return value


def _check_counts(num_items: int, num_parts: int) -> None:
    if num_parts < 1:
        raise PartitionError(f"{num_parts} stages; expected at least 1")
    if num_items < num_parts:
        raise PartitionError(
            f"{num_items} layers cannot fill {num_parts} stages; every stage needs at least one: use fewer stages or "
            "cut the model into more layers"
        )


def _integers(values: Sequence[Weight]) -> list[int]:
    """The values times their common denominator, exactly."""
    for value in values:
        if not isfinite(value) or value < 0:
            raise PartitionError(f"weight {value!r}; expected a finite number that is not negative")
    fractions = [Fraction(value) for value in values]
    scale = lcm(*(value.denominator for value in fractions))
    return [int(value * scale) for value in fractions]


def _first_guess(prefix: list[int], num_parts: int) -> Bounds:
    """A fair split: bound j where the weight first reaches j / num_parts of the whole, no part empty."""
    num_items = len(prefix) - 1
    bounds = [0]
    for part in range(1, num_parts):
        at = bisect_left(prefix, -(-prefix[-1] * part // num_parts))
        bounds.append(min(max(at, bounds[-1] + 1), num_items - num_parts + part))
    return (*bounds, num_items)


def _heaviest(prefix: list[int], fixed: list[int], bounds: Bounds) -> int:
    return max(prefix[b] - prefix[a] + more for a, b, more in zip(bounds, bounds[1:], fixed, strict=False))


def _search(prefix: list[int], fixed: list[int], cap: int, combine: Callable[[int, int], int]) -> Bounds:
    """The split with parts of at most `cap` that has the least value, folded over its parts by `combine`.

    `cap` must be reached by some split. O(n p w) with w the most items of one part under the cap.
    """
    num_items, num_parts = len(prefix) - 1, len(fixed)
    best: list[int | None] = [0, *[None] * num_items]
    last_bound: list[list[int]] = []
    for part, more in enumerate(fixed):
        following: list[int | None] = [None] * (num_items + 1)
        bound = [-1] * (num_items + 1)
        room = cap - more
        for stop in range(part + 1, num_items - (num_parts - part - 1) + 1):
            # The lightest beginning of this part that the cap allows; equal prefixes come from items of weight 0.
            first = bisect_left(prefix, prefix[stop] - room, part, stop)
            for start in range(first, stop):
                before = best[start]
                if before is None:
                    continue
                value = combine(before, prefix[stop] - prefix[start] + more)
                now = following[stop]
                if now is None or value < now:
                    following[stop], bound[stop] = value, start
        best = following
        last_bound.append(bound)
    bounds = [num_items]
    for bound in reversed(last_bound):
        bounds.append(bound[bounds[-1]])
    return tuple(reversed(bounds))
