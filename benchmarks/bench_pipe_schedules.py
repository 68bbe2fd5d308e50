"""Seconds to generate, validate and simulate each schedule at 64 stages x 1,024 micro-batches; no peer, no ranks."""

from __future__ import annotations

import sys
import time

import _common
from _common import Bench
from _ranks import SOURCES, Contender

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v")


def main() -> None:
    """Time every schedule, and append the results."""
    parser = _common.options(__doc__)
    parser.add_argument("--stages", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sys.path[:0] = SOURCES
    from ds_pipe import build, simulate, validate

    with Bench("pipe_schedules", options) as bench:
        for name in SCHEDULES:
            seconds: dict[str, list[float]] = {"generate_s": [], "validate_s": [], "simulate_s": [], "proven_s": []}
            for _ in range(1 if options.quick else options.rounds):
                start = time.perf_counter()
                schedule = build(name, options.stages, options.micro_batches)
                generated = time.perf_counter()
                validate(schedule)
                validated = time.perf_counter()
                simulate(schedule)
                simulated = time.perf_counter()
                for key, value in zip(
                    seconds,
                    (generated - start, validated - generated, simulated - validated, validated - start),
                    strict=True,
                ):
                    seconds[key].append(value)
            figures = {key: _common.summary(values) for key, values in seconds.items()}
            sizes = {"stages": options.stages, "micro_batches": options.micro_batches, "actions": schedule.num_actions}
            bench.write(Contender(name, model="none", dtype="none", world_size=0), **sizes, **figures)
            print(f"{name}: generated and validated in {figures['proven_s']['median']:.2f} s", flush=True)


if __name__ == "__main__":
    main()
