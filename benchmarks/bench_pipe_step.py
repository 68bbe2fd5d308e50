"""Seconds per training step of a pipeline: SmolLM2 (untied head) on two stages, against torch's and upstream's.

8 micro-batches of 1 x 256 tokens, bf16, one thread per stage. In turns, on the same weights: ours (1f1b, zb_h1, zb_v)
at the cut that is found by measuring, ours at the even cut and at neighbours of its own, Schedule1F1B of
`torch.distributed.pipelining` at both cuts; forward and backward only. Next to them the time that is simulated, from
the measured costs of layers before the run and from the measured actions of a run, and computing alone. Then, optimizer
included, `deepspeed.initialize` with a PipelineModule: upstream's and ours with the default split (by parameters), ours
with the split by measured cost, and that with zb_h1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from typing import Any

import _common
from _common import Bench
from _ranks import SOURCES, Contender, RankGroup

MICRO_BATCHES = 8
OWN = "1f1b@own"
CONTENDERS = ["torch@own", OWN, "zb_h1@own", "zb_v@own", "1f1b@even", "torch@even"]
NEIGHBOURS = (-2, -1, 1, 2)
ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "measured": {"measured": True},
    "zb_h1": {"measured": True, "schedule": "zb_h1"},
}


def main() -> None:
    """Run all parts that `--only` leaves, and append the results."""
    parser = _common.options(__doc__)
    parser.add_argument("--rounds", type=int, help="steps of each contender (default 7, quick 2)")
    parser.add_argument("--names", help="comma-separated, such as torch@own,1f1b@12: only their step times")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    pair = Contender(
        "pipe", script="_pipe_worker.py", extra={"micro_batches": MICRO_BATCHES, "repeats": 2 if options.quick else 5}
    )
    engine = replace(pair, kind="engine")
    with Bench("pipe_step", options) as bench:
        only = options.only.split(",") if options.only else ["steps", "ours", "upstream"]
        if "steps" in only:
            with bench.start(pair) as group:
                plan = steps(bench, group, options)
            if options.names:
                return
            with bench.start(replace(pair, extra={"micro_batches": MICRO_BATCHES, "repeats": 0})) as group:
                memory(bench, group, plan)
        sides = [replace(engine, extra={**pair.extra, **ENGINES[name]}) for name in ENGINES if "ours" in only]
        if "upstream" in only and options.peer_python:
            sides.append(replace(engine, upstream=True))
        if sides:
            with bench.started(sides) as groups:
                engines(bench, groups, options)


def steps(bench: Bench, group: RankGroup, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that runs over the same weights; returns what ds-pipe plans."""
    plan = group.ask({"do": "plan"})[0]
    own = plan["1f1b"]["parts"][1] - 2
    default = [*CONTENDERS, *(f"1f1b@{own + more}" for more in NEIGHBOURS)]
    names = options.names.split(",") if options.names else default
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names + ["compute"] * (not options.names)}
    for name in names:  # the first step of each makes its channels and buffers
        group.ask({"do": "step", "name": name})
    for round_ in range(options.rounds):
        for name in [*names[round_ % len(names) :], *names[: round_ % len(names)]]:
            found[name].append(combined(group.ask({"do": "step", "name": name})))
        if not options.names:
            found["compute"].append(combined(group.ask({"do": "compute", "name": OWN})))
    medians = {name: _common.summary([step["seconds"] for step in turns]) for name, turns in found.items()}
    replayed = {name: replay(group, name) for name in CONTENDERS[1:4] if not options.names}
    held = {name: group.ask({"do": "held", "name": name})[0]["peak_mb"] for name in replayed}
    for name in found:
        schedule, _, cut = name.partition("@")
        own_plan = plan.get(schedule, {}) if cut == "own" else {}
        bench.write(
            group.contender,
            what=name,
            step_s=medians[name],
            loss=found[name][-1].get("loss"),
            replayed_s=replayed.get(name),
            held_mb=held.get(name),
            **{key: own_plan.get(key) for key in ("parts", "simulated_s", "activation_mb")},
            profile_s=plan["profile_s"] if name == OWN else None,
        )
        print(f"  {name}: {medians[name]['median']:.3f} s, {share(found, names[0], name)} x {names[0]}", flush=True)
    for name, times in replayed.items():
        own_plan = plan[name.partition("@")[0]]
        print(f"  {name} planned {own_plan['simulated_s']:.3f} s, replayed {times}", flush=True)
        print(f"  {name} activations of {held[name]} MB, planned {own_plan['activation_mb']}", flush=True)
    print(f"  cut: {own} blocks and the rest, profiled in {plan['profile_s']:.1f} s", flush=True)
    return plan


def combined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest rank's seconds, and the loss of the one that has it."""
    losses = [answer["loss"] for answer in answers if answer.get("loss")]
    return {
        "seconds": max(answer["seconds"] for answer in answers),
        "loss": losses[0] if losses else None,
    }


def share(found: dict[str, list[dict[str, Any]]], peer: str, name: str) -> str:
    """How many times faster than the peer, as the median over the rounds."""
    pairs = zip(found[peer], found[name], strict=True)
    return f"{statistics.median(theirs['seconds'] / ours['seconds'] for theirs, ours in pairs):.3f}"


def memory(bench: Bench, group: RankGroup, plan: dict[str, Any]) -> None:
    """The peak of a first step, against what was there before plus gradients plus planned activations."""
    parts = plan["1f1b"]["parts"]
    answers = group.ask({"do": "step", "name": f"1f1b@{parts[1] - 2}"})
    planned = [
        answer["before_mb"] + answer["gradients_mb"] + activations
        for answer, activations in zip(answers, plan["1f1b"]["activation_mb"], strict=True)
    ]
    peaks = [answer["peak_mb"] for answer in answers]
    bench.write(group.contender, what="memory", parts=parts, peak_mb=peaks, planned_mb=planned, ranks=answers)
    print(f"  peak memory {peaks}, planned {planned} MB per stage", flush=True)


def replay(group: RankGroup, name: str) -> dict[str, float]:
    """The simulated time of the durations that one step's actions had, and that step's own time."""
    sys.path[:0] = [path for path in SOURCES if path not in sys.path]
    from ds_pipe import Action, Costs, Measured, build, simulate

    answers = group.ask({"do": "timeline", "name": name})
    spans = [[(Action.parse(code), start, end) for code, start, end in answer["spans"]] for answer in answers]
    schedule = build(name.partition("@")[0], group.contender.world_size, MICRO_BATCHES)
    simulated = simulate(schedule, Costs.from_measured(Measured.of(name, spans), schedule))
    measured = Measured.of(name, spans)
    return {
        "simulated_s": float(simulated.makespan),
        "actions_s": float(measured.makespan),
        "step_s": max(answer["seconds"] for answer in answers),
        "bubble": float(measured.bubble_fraction),
    }


def engines(bench: Bench, groups: list[RankGroup], options: argparse.Namespace) -> None:
    """All engines, in turns."""
    found: list[list[dict[str, Any]]] = [[] for _ in groups]
    plans = [group.ask({"do": "plan"})[0] for group in groups]
    for round_ in range(options.rounds + 1):
        for group, turns in zip(groups, found, strict=True):
            step = combined(group.ask({"do": "step", "name": "engine"}))
            if round_:
                turns.append(step)
    for group, turns, plan in zip(groups, found, plans, strict=True):
        step_s = _common.summary([turn["seconds"] for turn in turns])
        bench.write(group.contender, what="engine", step_s=step_s, loss=turns[-1]["loss"], parts=plan["parts"])
        options = {key: value for key, value in group.contender.extra.items() if key in ("measured", "schedule")}
        name = f"engine, {group.contender.label} {options or ''}"
        print(f"  {name}: {step_s['median']:.3f} s, split {plan['parts']}", flush=True)


if __name__ == "__main__":
    main()
