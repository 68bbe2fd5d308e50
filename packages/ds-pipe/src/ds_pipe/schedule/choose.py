"""Pick the fastest schedule whose activations fit, and say why the others lost.

The model is given as costs of n pieces (layers, or anything not to be cut), in order. For each candidate the pieces are
dealt to its virtual stages by the optimal contiguous split on forward plus backward time (`ds_pipe.partition`), the
schedule is generated and simulated, and among those whose largest `peak_activation` is within the cap the one with the
least makespan wins; at equal time the one that needs less memory, then the one named first. No formula is trusted:
uneven layers, slow links and unequal I and W all count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ds_pipe.errors import ScheduleError
from ds_pipe.partition import balanced
from ds_pipe.schedule._engine import Time
from ds_pipe.schedule.action import Schedule
from ds_pipe.schedule.gpipe import gpipe
from ds_pipe.schedule.inference import inference
from ds_pipe.schedule.interleaved import interleaved
from ds_pipe.schedule.one_f_one_b import one_f_one_b
from ds_pipe.schedule.simulate import Costs, Simulation, simulate
from ds_pipe.schedule.zb_h1 import zb_h1
from ds_pipe.schedule.zb_v import zb_v

__all__ = ["SCHEDULES", "Choice", "Verdict", "build", "choose"]

# Name -> generator and the number of chunks it has; 0: any number from 2 on.
SCHEDULES: dict[str, tuple[Callable[..., Schedule], int]] = {
    "1f1b": (one_f_one_b, 1),
    "zb_h1": (zb_h1, 1),
    "zb_v": (zb_v, 2),
    "interleaved": (interleaved, 0),
    "gpipe": (gpipe, 1),
    "inference": (inference, 1),
}
_MAX_CHUNKS = 4


@dataclass(frozen=True)
class Verdict:
    """What became of one candidate. Without `simulation` it could not be built; `reason` says why it lost, or won."""

    name: str
    num_chunks: int
    reason: str
    simulation: Simulation | None = None
    bounds: tuple[int, ...] = ()

    @property
    def peak_activation(self) -> Time:
        """The largest of all stages, in the unit of the costs."""
        return max(self.simulation.peak_activation) if self.simulation else 0

    def __str__(self) -> str:
        chunks = f" x{self.num_chunks}" if self.num_chunks > 1 else ""
        return f"{self.name}{chunks}: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """The winner, its simulation, the pieces' bounds (virtual stage k holds bounds[k] .. bounds[k + 1] - 1), and all
    verdicts, the winner's first."""

    schedule: Schedule
    simulation: Simulation
    bounds: tuple[int, ...]
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.verdicts))


def build(name: str, num_stages: int, num_micro_batches: int, num_chunks: int | None = None) -> Schedule:
    """The schedule called `name` (a key of SCHEDULES); `num_chunks` is for interleaved (default 2)."""
    if name not in SCHEDULES:
        raise ScheduleError(f"schedule {name!r} is unknown; expected one of {', '.join(SCHEDULES)}")
    generator, chunks = SCHEDULES[name]
    if not chunks:
        return generator(num_stages, num_micro_batches, 2 if num_chunks is None else num_chunks)
    if num_chunks not in (None, chunks):
        raise ScheduleError(f"{name} has {chunks} chunk(s) per stage, not {num_chunks}; interleaved has any number")
    return generator(num_stages, num_micro_batches)


def choose(
    costs: Costs,
    num_stages: int,
    num_micro_batches: int,
    memory_cap: Time | None = None,
    *,
    max_chunks: int = _MAX_CHUNKS,
) -> Choice:
    """The training schedule with the least simulated makespan whose activations fit.

    `costs` has an entry per piece of the model, `memory_cap` is per stage in the unit of `costs.activation` (None: no
    cap), `max_chunks` the largest number of chunks tried for interleaved.

    ScheduleError when nothing fits; the text lists what each candidate would need.
    """
    tried = [_try(*candidate, costs, num_stages, num_micro_batches) for candidate in _candidates(max_chunks)]
    fits = [
        (verdict.simulation.makespan, verdict.peak_activation, at, verdict)
        for at, verdict in enumerate(tried)
        if verdict.simulation and (memory_cap is None or verdict.peak_activation <= memory_cap)
    ]
    if not fits:
        reasons = "\n".join(f"  {_explain(verdict, None, memory_cap)}" for verdict in tried)
        raise ScheduleError(
            f"no schedule of {num_stages} stages and {num_micro_batches} micro-batches fits memory_cap={memory_cap}; "
            f"raise the cap, use more stages or checkpoint activations:\n{reasons}"
        )
    winner = min(fits, key=lambda found: found[:3])[3]
    assert winner.simulation is not None
    others = [_explain(verdict, winner, memory_cap) for verdict in tried if verdict is not winner]
    verdicts = (_explain(winner, winner, memory_cap), *sorted(others, key=_makespan))
    return Choice(winner.simulation.schedule, winner.simulation, winner.bounds, verdicts)


def _candidates(max_chunks: int) -> Iterator[tuple[str, int]]:
    for name, (_, chunks) in SCHEDULES.items():
        if name != "inference":
            yield from ((name, count) for count in ([chunks] if chunks else range(2, max_chunks + 1)))


def _try(name: str, num_chunks: int, costs: Costs, num_stages: int, num_micro_batches: int) -> Verdict:
    num_pieces, num_virtual = len(costs.forward), num_stages * num_chunks
    if num_pieces < num_virtual:
        return Verdict(name, num_chunks, f"needs {num_virtual} pieces of the model, the costs have {num_pieces}")
    try:
        schedule = build(name, num_stages, num_micro_batches, num_chunks)
    except ScheduleError as error:
        return Verdict(name, num_chunks, str(error))
    bounds = balanced(costs.totals, num_virtual)
    return Verdict(name, num_chunks, "", simulate(schedule, costs.merge(bounds)), bounds)


def _explain(verdict: Verdict, winner: Verdict | None, memory_cap: Time | None) -> Verdict:
    simulation, peak = verdict.simulation, verdict.peak_activation
    if simulation is None:
        return verdict
    took = f"makespan {float(simulation.makespan):.6g}, peak activation {float(peak):.6g}"
    if memory_cap is not None and peak > memory_cap:
        reason = f"needs {float(peak):.6g} of activations, the cap is {float(memory_cap):.6g}; {took}"
    elif winner is None or winner.simulation is None or verdict is winner:
        reason = f"the fastest that fits; {took}"
    elif simulation.makespan > winner.simulation.makespan:
        slower = float(simulation.makespan) / float(winner.simulation.makespan) - 1
        reason = f"{slower:.1%} slower than {winner.name}; {took}"
    elif peak > winner.peak_activation:
        reason = f"as fast as {winner.name} with more memory; {took}"
    else:
        reason = f"as fast as {winner.name} with the same memory, which is preferred; {took}"
    return Verdict(verdict.name, verdict.num_chunks, reason, simulation, verdict.bounds)


def _makespan(verdict: Verdict) -> float:
    return float(verdict.simulation.makespan) if verdict.simulation else float("inf")
