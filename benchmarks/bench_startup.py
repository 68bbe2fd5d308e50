"""What it costs before the first step: `import deepspeed` against `import torch`, and `initialize()`.

Imports are timed in fresh interpreters, torch first, in turns. `initialize_s` is the call alone, after the model was
loaded and the process group made (`init_distributed_s`), on two ranks. `--cold` also times it as on a fresh machine,
with empty caches for compiled code (upstream then compiles C++ for two minutes; we may compile numba functions).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import _common
from _common import Bench
from _ranks import Contender, environment

CODE = """
import time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
import {module}
print(torch_s, time.perf_counter() - start)
"""


def main() -> None:
    """Time imports, then `initialize()`, and append the results."""
    parser = _common.options(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="interpreters started per import")
    parser.add_argument("--cold", action="store_true", help="also time initialize() with empty compilation caches")
    options = parser.parse_args()
    with Bench("startup", options) as bench:
        imports(bench, 3 if options.quick else options.rounds)
        stages = (2, 3) if options.quick else range(4)
        initializes(bench, list(stages), cold=False)
        if options.cold:
            initializes(bench, [2], cold=True)


def imports(bench: Bench, rounds: int) -> None:
    """`import deepspeed` on top of `import torch`, both sides in turns; each round is one pair."""
    sides = bench.chosen([Contender("engine", stage=None), Contender("engine", stage=None, upstream=True)])
    torch_s: list[list[float]] = [[] for _ in sides]
    total_s: list[list[float]] = [[] for _ in sides]
    for round_ in range(rounds + 1):
        for index, side in enumerate(sides):
            python = bench.python(side)
            command = [python, "-c", CODE.format(module="deepspeed")]
            env = environment(side.upstream, python)
            output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            first, both = (float(word) for word in output.split()[-2:])
            if round_:  # the first start of each fills the page cache
                torch_s[index].append(first)
                total_s[index].append(both)
    for side, first_s, both_s in zip(sides, torch_s, total_s, strict=True):
        ratio = _common.summary([both / first for first, both in zip(first_s, both_s, strict=True)])
        bench.write(
            side, what="import", torch_s=_common.summary(first_s), both_s=_common.summary(both_s), import_ratio=ratio
        )
        print(f"import deepspeed / import torch, {side.label}: {ratio['median']:.3f}", flush=True)


def initializes(bench: Bench, stages: list[int], *, cold: bool) -> None:
    """`initialize()` of SmolLM2, each stage in a fresh pair of ranks."""
    repeats = 1 if bench.options.quick or cold else 3
    for stage in stages:
        for side in bench.chosen([Contender("engine", stage=stage, upstream=peer) for peer in (False, True)]):
            ready = []
            for repeat in range(repeats):
                if cold:
                    caches = bench.scratch / f"caches-{side.label}-{repeat}"
                    for name in ("TORCH_EXTENSIONS_DIR", "NUMBA_CACHE_DIR"):
                        os.environ[name] = str(caches / name.lower())
                        Path(os.environ[name]).mkdir(parents=True)
                with bench.start(side) as group:
                    ready.append(group.ready)
            names = ("init_distributed_s", "build_s", "initialize_s")
            figures = {name: _common.summary([one[name] for one in ready]) for name in names}
            bench.write(side, what="initialize_cold" if cold else "initialize", **figures)
            print(f"{group}{' cold' if cold else ''}: initialize {figures['initialize_s']['median']:.2f} s", flush=True)


if __name__ == "__main__":
    main()
