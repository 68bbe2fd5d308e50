"""A training step of SmolLM2-135M with `apply_kernels` and without: seconds, peak memory, and the loss over 30 steps.

The step is forward and backward of 2 x 256 tokens without padding, transformers' own sdpa attention on the other side.
Times are taken in turns on one model, which is patched and unpatched between rounds. Memory is the peak of a fresh
process (resident, sampled) in one step beyond what was resident before it, gradients included. `losses` trains both,
each in a process of its own, from the same weights with AdamW (lr 2e-5, torch's) on the same 30 batches, and says the
largest relative difference of a loss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import models
import torch
from _common import machine, write_line
from _kernels import KernelBench, options, peak_rss_mb

from ds_kernels import apply_kernels

CONTENDERS = ("apply_kernels", "transformers")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--what", choices=["time", "memory", "losses"], default="time")
    parser.add_argument("--steps", type=int, default=30, help="of `losses`")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence, in `losses` and `memory`")
    parser.add_argument("--one", choices=CONTENDERS, help="internal: measure this contender in this process")
    arguments = parser.parse_args()
    folder = arguments.scratch or Path(tempfile.gettempdir()) / "ds-bench-kernels"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "smollm2.tokens.pt").exists():
        models.prepare("smollm2", folder)
    if arguments.one:
        print(json.dumps(measure(arguments, folder)))
        return
    bench = KernelBench("kernels_apply", arguments)
    for dtype in arguments.dtypes.split(","):
        if arguments.what == "time":
            times(bench, folder, dtype)
        else:
            compare(bench, dtype)


def times(bench: KernelBench, folder: Path, dtype: str) -> None:
    """Both ways in turns."""
    model, inputs = prepared(folder, dtype, bench.arguments.device)

    def patched() -> None:
        with apply_kernels(model):
            step(model, inputs(0))

    for _ in bench.threads():
        calls = {"apply_kernels": patched, "transformers": lambda: step(model, inputs(0))}
        medians = bench.compare(f"training step, SmolLM2-135M, 2 x 256, {dtype}", calls, dtype=dtype)
        print(f"{medians['transformers'] / medians['apply_kernels']:.3f} x", flush=True)


def compare(bench: KernelBench, dtype: str) -> None:
    """What needs a process each: memory, and losses."""
    arguments, losses = bench.arguments, []
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--one", name, "--dtypes", dtype, "--what", arguments.what]
        command += ["--steps", str(arguments.steps), "--device", arguments.device, "--tokens", str(arguments.tokens)]
        command += ["--scratch", str(arguments.scratch)] if arguments.scratch else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        case = f"{arguments.what}, SmolLM2-135M, 2 x {arguments.tokens}, {dtype}"
        line = {"bench": bench.name, "run": bench.run, "case": case}
        versions = {"contender": name, "torch": torch.__version__}
        write_line(Path(arguments.results) / f"{bench.name}.jsonl", {**line, **versions, **figures, **machine()})
        print(f"{arguments.what} {dtype} {name:16} {figures}", flush=True)
        losses.append(figures.get("losses", []))
    apart = max((abs(ours - theirs) / theirs for ours, theirs in zip(*losses, strict=True)), default=0.0)
    if arguments.what == "losses":
        print(f"{dtype}: the losses differ by {apart:.2e} at most", flush=True)


def prepared(folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """The model in training, and `inputs(step)`."""
    model = models.load("smollm2", folder, dtype).train().to(device)

    def inputs(index: int) -> dict[str, Any]:
        return models.arguments("smollm2", models.batch("smollm2", folder, index, 0, 1).to(device))

    return model, inputs


def step(model: Any, inputs: dict[str, Any]) -> float:
    """Forward and backward; the loss."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return float(loss)  # waits for the device


def cut(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The first tokens of every sequence."""
    return {name: value[:, :tokens] if torch.is_tensor(value) else value for name, value in inputs.items()}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One contender in this process."""
    model, inputs = prepared(folder, arguments.dtypes, arguments.device)
    if arguments.one == "apply_kernels":
        apply_kernels(model)
    if arguments.what == "losses":
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
        losses = []
        for index in range(arguments.steps):
            losses.append(step(model, cut(inputs(index), arguments.tokens)))
            optimizer.step()
        return {"losses": losses}
    step(model, cut(inputs(0), 8))  # compiles, allocates workspaces
    model.zero_grad()
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
        step(model, cut(inputs(0), arguments.tokens))
        return {"extra_mb": torch.cuda.max_memory_allocated() / 1e6 - before}
    peak, before = peak_rss_mb(lambda: step(model, cut(inputs(0), arguments.tokens)))
    return {"extra_mb": peak - before}


if __name__ == "__main__":
    main()
