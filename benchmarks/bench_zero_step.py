"""Step time of ZeRO stages 0-3, paired: this project, upstream DeepSpeed, FSDP2, DDP (fp32) and compute alone.

All contenders of one (model, dtype, stage) live at once and take turns. Rank memory is in `bench_zero_memory.py`,
where each contender has the machine to itself. Losses are recorded: equal mathematics shows as equal losses.
"""

from __future__ import annotations

import argparse

import _common
import _ranks
import models
from _common import Bench
from _ranks import Contender

CASES = [("smollm2", "bf16"), ("gpt", "bf16"), ("gpt", "fp32")]
QUICK = [("smollm2", "bf16", 2), ("smollm2", "bf16", 3), ("gpt", "bf16", 2)]


def contenders(model: str, dtype: str, stage: int) -> list[Contender]:
    """Everyone who takes part in one comparison."""
    found = [
        Contender("engine", model, dtype, stage),
        Contender("engine", model, dtype, stage, upstream=True),
        Contender("fsdp2", model, dtype),
        Contender("compute", model, dtype),
    ]
    return [*found, Contender("ddp", model, dtype)] if dtype == "fp32" else found


def main() -> None:
    """Run the cases asked for and append their results."""
    parser = _common.options(__doc__)
    parser.add_argument("--model", choices=models.MODELS)
    parser.add_argument("--dtype", choices=tuple(models.DTYPES))
    parser.add_argument("--stage", type=int, choices=range(4))
    parser.add_argument("--rounds", type=int, help="turns of each contender (default 4, quick 2)")
    parser.add_argument("--steps", type=int, help="steps of a turn (default: smollm2 3, quick 2; gpt 12)")
    options = parser.parse_args()
    cases = QUICK if options.quick else [(model, dtype, stage) for model, dtype in CASES for stage in range(4)]
    cases = [
        case
        for case in cases
        if options.model in (None, case[0]) and options.dtype in (None, case[1]) and options.stage in (None, case[2])
    ]
    with Bench("zero_step", options) as bench:
        for model, dtype, stage in cases:
            compare(bench, options, model, dtype, stage)


def compare(bench: Bench, options: argparse.Namespace, model: str, dtype: str, stage: int) -> None:
    """One comparison: start all, take turns, write a line each."""
    print(f"{model} {dtype} stage {stage}", flush=True)
    shape = models.SHAPES[model]
    rounds = options.rounds or (2 if options.quick else 4)
    steps = options.steps or ((2 if options.quick else 3) if model == "smollm2" else 12)
    warm_up = 1 if options.quick else _ranks.WARM_UP_STEPS
    with bench.started(bench.chosen(contenders(model, dtype, stage))) as groups:
        for group, turns in zip(groups, _ranks.take_turns(groups, rounds, steps, warm_up), strict=True):
            step = _common.summary(turns.seconds)
            tokens = shape.batch * shape.length * group.contender.world_size
            bench.write(
                group.contender,
                case_stage=stage,
                step_s=step,
                cpu_s=_common.summary(turns.cpu_seconds),
                tokens_per_s=tokens / step["median"],
                losses=turns.losses,
                **group.ready,
            )
            print(
                f"  {group}: {step['median']:.3f} s (p20 {step['p20']:.3f}, p80 {step['p80']:.3f}), "
                f"last loss {turns.losses[-1]:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
