"""What the engine costs where it has nothing to do: one rank, GPT, fp32, against the loop a user would write.

The bare loop is forward, backward, `clip_grad_norm_`, fused AdamW. The engine runs each ZeRO stage; upstream too.
"""

from __future__ import annotations

import statistics

import _common
from _common import Bench
from _ranks import Contender, take_turns


def main() -> None:
    """All contenders alive, in turns; one line each."""
    parser = _common.options(__doc__)
    parser.add_argument("--rounds", type=int, help="turns of each contender (default 8, quick 4)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn")
    parser.add_argument("--dtype", choices=("fp32",), default="fp32", help="the bare loop keeps no master copy")
    options = parser.parse_args()
    stages = (0, 2) if options.quick else range(4)
    contenders = [Contender("bare", "gpt", options.dtype, world_size=1)]
    for peer in (False, True):
        contenders += [Contender("engine", "gpt", options.dtype, stage, peer, world_size=1) for stage in stages]
    with Bench("overhead", options) as bench, bench.started(bench.chosen(contenders)) as groups:
        turns = take_turns(groups, options.rounds or (4 if options.quick else 8), options.steps)
        bare = next((turn for group, turn in zip(groups, turns, strict=True) if group.contender.kind == "bare"), None)
        for group, turn in zip(groups, turns, strict=True):
            step = _common.summary(turn.seconds)
            figures = {"step_s": step, "cpu_s": _common.summary(turn.cpu_seconds), "losses": turn.losses}
            if bare is not None:
                pairs = zip(medians(turn.seconds, options.steps), medians(bare.seconds, options.steps), strict=True)
                figures["over_bare"] = _common.summary([mine / theirs for mine, theirs in pairs])
            bench.write(group.contender, **figures, **group.ready)
            over = f", {figures['over_bare']['median']:.3f} x bare" if bare is not None else ""
            print(f"  {group}: {step['median']:.4f} s{over}, last loss {turn.losses[-1]:.6f}", flush=True)


def medians(seconds: list[float], steps: int) -> list[float]:
    """The median step of every turn of `steps` steps."""
    return [statistics.median(seconds[start : start + steps]) for start in range(0, len(seconds), steps)]


if __name__ == "__main__":
    main()
