"""Serving 64 requests that arrive by a Poisson process: ours, transformers' padded batches, llama.cpp's slots.

Prompts of 16-512 and answers of 8-128 tokens, both uniform, at most `--slots` side by side, the same trace for each
(see `_infer_serve.py`). Figures: tokens of answers per second from the first arrival to the last token, and percentiles
of the time to a request's first token, waiting included. Every round has other prompts of the same lengths, so that no
cached prefix helps anyone.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import _infer
from _common import summary
from _ranks import RankGroup

CONTENDERS = (
    *("ours:bf16", "ours:int8", "transformers:bf16"),
    *("llama.cpp:f16", "llama.cpp:bf16", "llama.cpp:q8_0"),
)


def main() -> None:
    parser = _infer.options(__doc__)
    parser.set_defaults(rounds=2)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=8.0, help="arrivals per second, on average")
    parser.add_argument("--slots", type=int, default=8, help="requests side by side")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    with _infer.InferBench("infer_serving", arguments) as bench:
        contenders = bench.contenders(CONTENDERS, slots=arguments.slots)
        with bench.started(contenders) as groups:
            measure(bench, groups, rounds, arguments)


def measure(bench: _infer.InferBench, groups: list[RankGroup], rounds: int, arguments: argparse.Namespace) -> None:
    """Turns: the whole trace by one contender after the other."""
    runs: list[list[dict[str, Any]]] = [[] for _ in groups]
    for group in groups:
        serve(group, trace(bench, arguments, 4, rounds), arguments.slots)
    order = list(zip(groups, runs, strict=True))
    for index in range(rounds):
        pivot = index % len(order)
        requests = trace(bench, arguments, arguments.requests, index)
        for group, mine in order[pivot:] + order[:pivot]:
            mine.append(serve(group, requests, arguments.slots))
            print(f"  round {index}, {group.contender.label}: {mine[-1]['total_s']:.1f} s", flush=True)
    for group, mine in order:
        figures = {name: summary([run[name] for run in mine]) for name in mine[0]}
        bench.line(
            group.contender.label,
            slots=arguments.slots,
            requests=arguments.requests,
            rate=arguments.rate,
            **figures,
            versions=group.ready["versions"],
        )
        medians = {name: float(figure["median"]) for name, figure in figures.items()}
        print(
            f"{group.contender.label:20} {medians['tokens_per_s']:8.1f} tokens/s  first token p50 "
            f"{medians['first_p50_s']:.2f} s, p95 {medians['first_p95_s']:.2f} s  all in {medians['total_s']:.1f} s",
            flush=True,
        )


def trace(bench: _infer.InferBench, arguments: argparse.Namespace, count: int, index: int) -> list[dict[str, Any]]:
    """Requests of round `index`; arrivals and lengths are the same in each round."""
    chance = random.Random(0)
    lengths = [chance.randint(16, 512) for _ in range(count)]
    news = [chance.randint(8, 128) for _ in range(count)]
    moments = [0.0]
    for _ in range(count - 1):
        moments.append(moments[-1] + chance.expovariate(arguments.rate))
    prompts = _infer.prompts(bench.assets, lengths, offset=211 * index)
    return [{"at": at, "prompt": prompt, "new": new} for at, prompt, new in zip(moments, prompts, news, strict=True)]


def serve(group: RankGroup, requests: list[dict[str, Any]], slots: int) -> dict[str, float]:
    """One contender's turn."""
    answer = group.ask({"do": "serve", "requests": requests, "slots": slots})[0]
    waits = sorted(first - request["at"] for first, request in zip(answer["first"], requests, strict=True))
    total = max(answer["last"])
    return {
        "tokens_per_s": sum(request["new"] for request in requests) / total,
        "total_s": total,
        "first_p50_s": waits[len(waits) // 2],
        "first_p95_s": waits[min(len(waits) - 1, round(0.95 * len(waits)))],
    }


if __name__ == "__main__":
    main()
