"""Milliseconds per token and per prompt of SmolLM2-135M: ours, transformers, upstream and llama.cpp, in turns.

Cases: `decode` (one sequence, a prompt of 64 tokens), `batch8` (eight such sequences), `first` (the first token after a
prompt of 512). A decode step is (seconds of 1 + n tokens - seconds of 1 token) / n, so reading the prompt is not in it.
`share` is the share of the roofline that a step reaches: weight bytes over the triad's bandwidth, which is measured
between the rounds of the same run while all contenders sleep.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import _infer
import torch
from _common import summary
from _kernels import triad
from _ranks import RankGroup

OURS = ("ours:bf16", "ours:int8", "ours:int4", "ours-torch:bf16")
DENSE = ("transformers:bf16", "upstream:bf16", "llama.cpp:f16", "llama.cpp:bf16")
CONTENDERS = {
    "decode": (*OURS, "ours:fp32", *DENSE, "compiled:bf16", "llama.cpp:q8_0", "llama.cpp:q4_0", "llama.cpp:q4_1"),
    "batch8": (*OURS, *DENSE, "llama.cpp:q8_0", "llama.cpp:q4_0"),
    "first": (*OURS, *DENSE, "llama.cpp:q8_0", "llama.cpp:q4_0"),
}
PROMPTS = {"decode": (1, 64), "batch8": (8, 64), "first": (1, 512)}


def main() -> None:
    parser = _infer.options(__doc__)
    parser.add_argument("--cases", default=",".join(PROMPTS), help="comma-separated part of the cases")
    parser.add_argument("--new", type=int, default=48, help="tokens per timed generation, after the first")
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    rounds = min(arguments.rounds, 3) if arguments.quick else arguments.rounds
    torch.set_num_threads(arguments.threads)
    with _infer.InferBench("infer_decode", arguments) as bench:
        labels = list(dict.fromkeys(label for case in cases for label in CONTENDERS[case]))
        with bench.started(bench.contenders(labels)) as groups:
            for case in cases:
                chosen = [group for group in groups if group.contender.label in CONTENDERS[case]]
                measure(bench, case, chosen, rounds, arguments)


def measure(
    bench: _infer.InferBench, case: str, groups: list[RankGroup], rounds: int, arguments: argparse.Namespace
) -> None:
    """Turns of one case; writes and prints a line per contender."""
    rows, length = PROMPTS[case]
    new = 0 if case == "first" else arguments.new
    prompts = _infer.prompts(bench.assets, [length] * rows)
    turns: list[list[dict[str, Any]]] = [[] for _ in groups]
    for group in groups:
        turn(group, prompts, min(new, 8))
    bandwidths = [triad(rounds=5)]
    order = list(zip(groups, turns, strict=True))
    for index in range(rounds):
        pivot = index % len(order)
        for group, mine in order[pivot:] + order[:pivot]:
            mine.append(turn(group, prompts, new))
        bandwidths.append(triad(rounds=5))
    bandwidth = float(summary(bandwidths)["median"])
    figure = "first_s" if case == "first" else "step_s"
    medians: dict[str, float] = {}
    for group, mine in order:
        label = group.contender.label
        seconds = summary([answer[figure] for answer in mine])
        medians[label] = float(seconds["median"])
        nbytes = group.ask({"do": "weights"})[0]["nbytes"]
        roofline = nbytes / bandwidth
        bench.line(
            label,
            case=case,
            rows=rows,
            prompt=length,
            new=new,
            **{figure: seconds},
            first_token_s=summary([answer["first_s"] for answer in mine]),
            weight_nbytes=nbytes,
            triad_gb_per_s=bandwidth / 1e9,
            **({} if case == "first" else {"roofline_s": roofline, "share": roofline / medians[label]}),
            tokens=mine[0]["tokens"][:16],
            versions=group.ready["versions"],
        )
        share = "" if case == "first" else f"  {roofline / medians[label]:6.1%} of the roofline {roofline * 1e3:.2f} ms"
        spread = f"({seconds['p20'] * 1e3:.2f}-{seconds['p80'] * 1e3:.2f})"
        print(f"{case:8} {label:20} {medians[label] * 1e3:8.2f} ms {spread}{share}", flush=True)
    print(f"triad {bandwidth / 1e9:.1f} GB/s, {arguments.threads} threads", file=sys.stderr)


def turn(group: RankGroup, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """One turn: the first token alone, then it and `new` more."""
    first = group.ask({"do": "generate", "prompts": prompts, "new": 1})[0]
    if not new:
        return {"first_s": first["seconds"], "tokens": first["tokens"][0]}
    answer = group.ask({"do": "generate", "prompts": prompts, "new": 1 + new})[0]
    step = (answer["seconds"] - first["seconds"]) / new
    return {"first_s": first["seconds"], "step_s": step, "tokens": answer["tokens"][0]}


if __name__ == "__main__":
    main()
