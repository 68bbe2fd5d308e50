"""Loading SmolLM2-135M from safetensors: peak memory over the weights, and from start to the first token.

Every start is a new process, contenders in turns. `start_to_first_token_s` is the parent's clock from starting the
process to its first token for a prompt of 16, imports included. `peak_over_weights` is the rise of resident memory
(VmHWM, reset after imports) while the engine is made, over the bytes of its weights; pages of files count while mapped.
`ours` is given a model that transformers loaded; `ours-checkpoint` one on `meta` and the folder to read.
"""

from __future__ import annotations

import time
from typing import Any

import _infer
from _common import summary

CONTENDERS = ("ours:bf16", "ours-checkpoint:bf16", "ours:int8", "transformers:bf16", "upstream:bf16", "llama.cpp:bf16")


def main() -> None:
    parser = _infer.options(__doc__)
    parser.set_defaults(rounds=3)
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    with _infer.InferBench("infer_load", arguments) as bench:
        contenders = bench.contenders(CONTENDERS)
        bench.prepare()
        prompts = _infer.prompts(bench.assets, [16])
        found: dict[str, list[dict[str, Any]]] = {contender.label: [] for contender in contenders}
        for index in range(rounds + 1):  # the first fills the page cache and caches of compiled code
            for contender in contenders:
                start = time.perf_counter()
                with bench.start(contender) as group:
                    group.ask({"do": "generate", "prompts": prompts, "new": 1})
                    seconds = time.perf_counter() - start
                    nbytes = group.ask({"do": "weights"})[0]["nbytes"]
                    ready = group.ready
                if index:
                    rise = (ready["build_peak_mb"] - ready["imported_mb"]) * 1e6
                    facts = {"start_to_first_token_s": seconds, "peak_over_weights": rise / nbytes}
                    kept = {key: ready[key] for key in ("import_s", "build_s", "imported_mb", "build_peak_mb")}
                    found[contender.label].append({**facts, **kept, "weights_mb": nbytes / 1e6})
                    versions = ready["versions"]
        for label, runs in found.items():
            figures = {name: summary([run[name] for run in runs]) for name in runs[0]}
            bench.line(label, **figures, versions=versions)
            medians = {name: float(figure["median"]) for name, figure in figures.items()}
            print(
                f"{label:22} start to first token {medians['start_to_first_token_s']:6.2f} s (imports "
                f"{medians['import_s']:.2f}, build {medians['build_s']:.2f}); peak of the build "
                f"{medians['peak_over_weights']:.2f} x {medians['weights_mb']:.0f} MB of weights",
                flush=True,
            )


if __name__ == "__main__":
    main()
