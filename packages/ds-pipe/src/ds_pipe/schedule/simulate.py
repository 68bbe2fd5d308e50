"""What a schedule costs before anything runs: time line, makespan, bubbles, memory.

`Costs` says how long each kind of work takes on each virtual stage (any unit; ints and Fractions keep the results
exact), what a message adds, and how much one activation takes. `simulate` plays the schedule by events, O(actions).

Two numbers say how much time is lost, W being the work of a stage averaged over the p stages:

    bubble_fraction = 1 - W / period,    period   = max over stages of (its last end - its first start)
    idle_fraction   = 1 - W / makespan,  makespan = last end of all

The papers' formulas are about the first: steps follow each other without a barrier, so a stage that starts late only
shifts. The second also counts the ramp of a single step. They are equal for gpipe, 1f1b, interleaved and zb_h1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from ds_pipe.errors import ScheduleError
from ds_pipe.schedule._engine import Time, Times, peak_live, run
from ds_pipe.schedule.action import Action, Schedule

__all__ = ["Costs", "Measured", "Simulation", "Span", "play", "simulate"]


@dataclass(frozen=True)
class Costs:
    """Costs per virtual stage, in model order: five sequences of the same length, and the latency of one hop.

    `backward` is the time of B and defaults to input plus weight gradient. `activation` is the size of what one
    micro-batch keeps alive between F and B or W (bytes, or the default of 1 for counting). `latency` is added when a
    result goes to another stage.
    """

    forward: tuple[Time, ...]
    input_gradient: tuple[Time, ...]
    weight_gradient: tuple[Time, ...]
    backward: tuple[Time, ...] = ()
    activation: tuple[Time, ...] = ()
    latency: Time = 0

    def __post_init__(self) -> None:
        num = len(self.forward)
        for name in ("forward", "input_gradient", "weight_gradient", "backward", "activation"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.backward and len(self.input_gradient) == len(self.weight_gradient):
            both = zip(self.input_gradient, self.weight_gradient, strict=True)
            object.__setattr__(self, "backward", tuple(i + w for i, w in both))
        if not self.activation:
            object.__setattr__(self, "activation", (1,) * num)
        for name in ("forward", "input_gradient", "weight_gradient", "backward", "activation"):
            values = getattr(self, name)
            if len(values) != num:
                raise ScheduleError(f"Costs.{name} has {len(values)} entries; expected {num}, as many as forward")
            if any(not value >= 0 for value in values):
                raise ScheduleError(f"Costs.{name} is {values}; expected no negative number")
        if not self.latency >= 0:
            raise ScheduleError(f"Costs.latency is {self.latency}; expected no negative number")

    @classmethod
    def uniform(
        cls,
        num_virtual_stages: int,
        forward: Time = 1,
        input_gradient: Time = 1,
        weight_gradient: Time = 1,
        *,
        latency: Time = 0,
    ) -> Costs:
        """The same costs on every virtual stage."""
        num = num_virtual_stages
        return cls((forward,) * num, (input_gradient,) * num, (weight_gradient,) * num, latency=latency)

    @property
    def totals(self) -> tuple[Time, ...]:
        """Forward plus whole backward, per virtual stage."""
        return tuple(f + b for f, b in zip(self.forward, self.backward, strict=True))

    def merge(self, bounds: Sequence[int]) -> Costs:
        """Costs of larger pieces: piece j is the sum of entries bounds[j] .. bounds[j + 1] - 1."""

        def summed(values: tuple[Time, ...]) -> tuple[Time, ...]:
            return tuple(sum(values[a:b]) for a, b in itertools.pairwise(bounds))

        return Costs(
            summed(self.forward),
            summed(self.input_gradient),
            summed(self.weight_gradient),
            summed(self.backward),
            summed(self.activation),
            self.latency,
        )

    @classmethod
    def from_measured(cls, measured: Measured, schedule: Schedule, *, latency: Time = 0) -> Costs:
        """Mean measured durations per virtual stage of `schedule`, which the run followed.

        A run with whole backwards does not say how they split: input and weight gradient then get half each.
        """
        sums: dict[tuple[str, int], list[Time]] = {}
        for spans in measured.spans:
            for action, start, end in spans:
                sums.setdefault((action.kind, schedule.chunks[action.stage][action.chunk]), []).append(end - start)

        def mean(kind: str) -> tuple[Time, ...]:
            found = [sums.get((kind, virtual), ()) for virtual in range(schedule.num_virtual_stages)]
            return tuple(sum(values) / len(values) if values else 0 for values in found)

        backward, input_gradient, weight_gradient = mean("B"), mean("I"), mean("W")
        if any(backward):
            halves = tuple(value / 2 for value in backward)
            return cls(mean("F"), halves, halves, backward, latency=latency)
        return cls(mean("F"), input_gradient, weight_gradient, latency=latency)


class Span(NamedTuple):
    """One action on the clock."""

    action: Action
    start: Time
    end: Time


class _Clocked:
    """What a plan and a measured run have in common: spans per stage, each in order of time."""

    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> Time:
        """From the first start to the last end of all stages."""
        return max(last for _, last in self._extent) - min(first for first, _ in self._extent)

    @cached_property
    def period(self) -> Time:
        """The longest that one stage takes from its own first start to its own last end."""
        return max(last - first for first, last in self._extent)

    @cached_property
    def busy(self) -> tuple[Time, ...]:
        """Per stage, the sum of its actions' durations."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble_fraction(self) -> Fraction | float:
        """1 - mean busy / period."""
        return 1 - _ratio(sum(self.busy), len(self.spans) * self.period)

    @property
    def idle_fraction(self) -> Fraction | float:
        """1 - mean busy / makespan."""
        return 1 - _ratio(sum(self.busy), len(self.spans) * self.makespan)

    @cached_property
    def _extent(self) -> tuple[tuple[Time, Time], ...]:
        found = tuple((spans[0].start, spans[-1].end) for spans in self.spans if spans)
        if not found:
            raise ScheduleError("a run without a single action has no extent; record at least one span")
        return found


@dataclass(frozen=True)
class Measured(_Clocked):
    """A run as it was: per stage the actions with their start and end, in order, on one clock (seconds)."""

    name: str
    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def of(cls, name: str, stages: Iterable[Iterable[tuple[Action, Time, Time]]]) -> Measured:
        """From any nested iterables of (action, start, end)."""
        return cls(name, tuple(tuple(Span(*span) for span in spans) for spans in stages))


@dataclass(frozen=True)
class Simulation(_Clocked):
    """A schedule played with costs. Times have the unit of the costs and start at 0."""

    schedule: Schedule
    costs: Costs
    spans: tuple[tuple[Span, ...], ...]

    @property
    def name(self) -> str:
        return self.schedule.name

    @cached_property
    def peak_live(self) -> tuple[int, ...]:
        """Per stage, the most activations it holds at once, in (micro-batch, chunk) pairs."""
        return tuple(int(peak_live(self.schedule, stage)) for stage in range(self.schedule.num_stages))

    @cached_property
    def peak_activation(self) -> tuple[Time, ...]:
        """Per stage, the most it holds at once in the unit of `costs.activation`."""
        sizes = self.costs.activation
        return tuple(peak_live(self.schedule, stage, sizes) for stage in range(self.schedule.num_stages))


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Play `schedule` with `costs` (default: every kind takes 1, so B takes 2, and messages take nothing).

    ScheduleError if the costs have another number of virtual stages, or the schedule cannot run at all.
    """
    costs = costs or Costs.uniform(schedule.num_virtual_stages)
    starts, ends = play(schedule, costs)
    spans = tuple(tuple(map(Span, *columns)) for columns in zip(schedule.actions, starts, ends, strict=True))
    return Simulation(schedule, costs, spans)


def play(schedule: Schedule, costs: Costs) -> tuple[Times, Times]:
    """Starts and ends only, as lists that run beside `schedule.actions`; errors as `simulate`."""
    if len(costs.forward) != schedule.num_virtual_stages:
        raise ScheduleError(
            f"{schedule.name} has {schedule.num_virtual_stages} virtual stages, the costs are for "
            f"{len(costs.forward)}; Costs.merge makes costs of larger pieces from finer ones"
        )
    return run(schedule, costs.forward, costs.backward, costs.input_gradient, costs.weight_gradient, costs.latency)


def _ratio(part: Time, whole: Time) -> Fraction | float:
    if not whole:
        return 1.0
    if isinstance(part, (int, Fraction)) and isinstance(whole, (int, Fraction)):
        return Fraction(part) / Fraction(whole)
    return part / whole
