"""Step time of transformers' Trainer on SmolLM2, ZeRO 2 and 3: this project and upstream, the same script, in turns.

The interpreter needs transformers and accelerate, and deepspeed as an installed distribution (that is how they find it;
its code is this checkout's either way); the peer's needs accelerate besides. A step is a whole turn of the Trainer's
loop (`_trainer_worker.py`). With `--kernels` a third contender's config has our section `kernels` besides, which
the peer's does not know, so it is reported apart.
"""

from __future__ import annotations

import argparse

import _common
import _ranks
import models
from _common import Bench
from _ranks import Contender

CASES = [("bf16", 2), ("bf16", 3), ("fp32", 2), ("fp32", 3)]


def contenders(dtype: str, stage: int, kernels: bool) -> list[Contender]:
    """Everyone who takes part in one comparison."""
    script = "_trainer_worker.py"
    found = [Contender("engine", "smollm2", dtype, stage, upstream=peer, script=script) for peer in (False, True)]
    if kernels:
        found.append(Contender("engine", "smollm2", dtype, stage, script=script, extra={"kernels": True}))
    return found


def main() -> None:
    """Run the cases asked for and append their results."""
    parser = _common.options(__doc__)
    parser.add_argument("--dtype", choices=tuple(models.DTYPES))
    parser.add_argument("--stage", type=int, choices=(2, 3))
    parser.add_argument("--rounds", type=int, help="turns of each contender (default 3, quick 1)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--kernels", action="store_true", help="also ours with the config's section kernels")
    options = parser.parse_args()
    with Bench("trainer", options) as bench:
        for dtype, stage in CASES:
            if options.dtype in (None, dtype) and options.stage in (None, stage):
                compare(bench, options, dtype, stage)


def compare(bench: Bench, options: argparse.Namespace, dtype: str, stage: int) -> None:
    """One comparison: start all, take turns, write a line each, print how much faster ours is."""
    print(f"{dtype} stage {stage}", flush=True)
    rounds, shape = options.rounds or (1 if options.quick else 3), models.SHAPES["smollm2"]
    medians: dict[str, float] = {}
    with bench.started(bench.chosen(contenders(dtype, stage, options.kernels))) as groups:
        for group, turns in zip(groups, _ranks.take_turns(groups, rounds, options.steps), strict=True):
            step, contender = _common.summary(turns.seconds), group.contender
            name = f"{contender.label}{' with kernels' if contender.extra else ''}"
            medians[name] = float(step["median"])
            tokens = shape.batch * shape.length * contender.world_size
            bench.write(
                contender,
                case_stage=stage,
                step_s=step,
                cpu_s=_common.summary(turns.cpu_seconds),
                tokens_per_s=tokens / step["median"],
                losses=turns.losses,
                **group.ready,
            )
            print(f"  {name}: {step['median']:.3f} s (p20 {step['p20']:.3f}, p80 {step['p80']:.3f}), ", end="")
            print(f"last loss {turns.losses[-1]:.5f}", flush=True)
    for name, seconds in medians.items():
        if name != "upstream" and "upstream" in medians:
            print(f"  {name}: {medians['upstream'] / seconds:.2f} x faster than upstream", flush=True)


if __name__ == "__main__":
    main()
