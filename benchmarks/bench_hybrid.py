"""Tokens per second of the hybrid engine against the inference engine: SmolLM2-135M in bf16, in turns.

`hybrid` is a training engine (ZeRO-3, AdamW) whose every turn is a whole rollout: `eval()`, one `generate`, `train()`;
so gathering, reading the model and releasing it are in its figures. `ours` is `init_inference` with injected kernels,
built once. Cases are ranks x rows: every rank generates its own rows with its part of the threads, and the slowest
counts. The ratio is that of pairs of neighbouring turns; its median is the claim. Both give the same tokens.
"""

from __future__ import annotations

import argparse
from typing import Any

import _infer
from _common import summary
from _ranks import RankGroup

CONTENDERS = ("ours:bf16", "hybrid:bf16")
CASES = ((1, 1), (1, 8), (2, 4))
LENGTH = 64


def main() -> None:
    parser = _infer.options(__doc__)
    parser.add_argument("--cases", help="comma-separated ranks x rows (default: 1x1,1x8,2x4)")
    parser.add_argument("--new", type=int, default=64, help="tokens per rollout")
    arguments = parser.parse_args()
    named = [tuple(map(int, case.split("x"))) for case in (arguments.cases or "").split(",") if case]
    rounds = min(arguments.rounds, 3) if arguments.quick else arguments.rounds
    with _infer.InferBench("hybrid", arguments) as bench:
        for world_size in dict.fromkeys(ranks for ranks, _ in named or CASES):
            with bench.started(bench.contenders(CONTENDERS, world_size)) as groups:
                for ranks, rows in named or CASES:
                    if ranks == world_size:
                        measure(bench, groups, ranks, rows, rounds, arguments)


def measure(
    bench: _infer.InferBench,
    groups: list[RankGroup],
    ranks: int,
    rows: int,
    rounds: int,
    arguments: argparse.Namespace,
) -> None:
    """Turns of one case; writes and prints a line per contender."""
    command = {"do": "generate", "prompts": _infer.prompts(bench.assets, [LENGTH] * rows), "new": arguments.new}
    for group in groups:
        group.ask({**command, "new": 4})
    seconds: list[list[float]] = [[] for _ in groups]
    tokens: list[Any] = [None for _ in groups]
    for index in range(rounds):
        for place in range(len(groups)) if index % 2 else reversed(range(len(groups))):
            answers = groups[place].ask(command)
            seconds[place].append(max(answer["seconds"] for answer in answers))
            tokens[place] = [answer["tokens"] for answer in answers]
    total = ranks * rows * arguments.new
    for place, group in enumerate(groups):
        rates = summary([total / one for one in seconds[place]])
        ratio = summary([first / own for first, own in zip(seconds[0], seconds[place], strict=True)])
        same = tokens[place] == tokens[0]
        bench.line(
            group.contender.label,
            case=f"{ranks}x{rows}",
            prompt=LENGTH,
            new=arguments.new,
            tokens_per_s=rates,
            of_standalone=ratio,
            same_tokens=same,
            versions=group.ready["versions"],
        )
        print(
            f"{ranks} ranks x {rows} rows  {group.contender.label:12} {rates['median']:8.1f} tokens/s"
            f" ({rates['p20']:.1f}-{rates['p80']:.1f})  {ratio['median']:.3f} of the first  same tokens: {same}",
            flush=True,
        )


if __name__ == "__main__":
    main()
