"""cross_entropy and linear_cross_entropy, loss and gradients, against torch's, at the size of SmolLM2's head.

Timed: forward and backward of the mean loss. `unfused fp32 loss` is what transformers does (`F.linear(...).float()`
into `F.cross_entropy`), `unfused` leaves the logits in their dtype. Memory is that of one forward and backward in a
fresh process (CPU: resident memory, sampled; CUDA: the allocator's) beyond inputs and resulting gradients; `share`
is that over the unfused with fp32 loss.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _common import machine, write_line
from _kernels import KernelBench, options, peak_rss_mb
from torch import Tensor
from torch.nn import functional

from ds_kernels import cross_entropy, linear_cross_entropy

VOCABULARY, DIM = 49152, 576
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "ours": lambda x, weight, target: linear_cross_entropy(x, weight, target),
    "unfused fp32 loss": lambda x, weight, target: functional.cross_entropy(
        functional.linear(x, weight).float(), target
    ),
    "unfused": lambda x, weight, target: functional.cross_entropy(functional.linear(x, weight), target),
    "ours, cross_entropy alone": lambda x, weight, target: cross_entropy(functional.linear(x, weight), target),
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="512", help="comma-separated numbers of tokens (512 and 4096 are the goals')")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--what", choices=["time", "memory"], default="time")
    parser.add_argument("--first", type=int, default=len(LOSSES), help="time only so many contenders")
    parser.add_argument("--one", help="internal: measure the memory of this contender in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(peak_extra_mb(arguments))
        return
    bench = KernelBench("kernels_cross_entropy", arguments)
    for dtype in arguments.dtypes.split(","):
        for rows in (int(part) for part in arguments.rows.split(",")):
            if arguments.what == "memory":
                memory(bench, dtype, rows)
            else:
                times(bench, dtype, rows)


def inputs(dtype: str, rows: int, device: str, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """x and weight, which want gradients, and targets."""
    torch.manual_seed(0)
    x = torch.empty(rows, DIM, device=device, dtype=DTYPES[dtype]).normal_()
    weight = torch.empty(vocabulary, DIM, device=device, dtype=DTYPES[dtype]).normal_(0.0, 0.02)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocabulary, (rows,), device=device)


def times(bench: KernelBench, dtype: str, rows: int) -> None:
    """Loss and gradients of every contender, in turns."""
    x, weight, target = inputs(dtype, rows, bench.arguments.device)

    def step(loss: Loss) -> Callable[[], object]:
        def run() -> None:
            loss(x, weight, target).backward()
            x.grad = weight.grad = None
            if x.is_cuda:
                torch.cuda.synchronize()

        return run

    for _ in bench.threads():
        bench.compare(
            f"loss and gradients, {rows} x {VOCABULARY}, dim {DIM}, {dtype}",
            {name: step(loss) for name, loss in list(LOSSES.items())[: bench.arguments.first]},
            dtype=dtype,
            flops=6 * rows * VOCABULARY * DIM,
        )


def memory(bench: KernelBench, dtype: str, rows: int) -> None:
    """Peak memory of every contender, each in a process of its own."""
    found = {}
    for name in LOSSES:
        command = [sys.executable, __file__, "--one", name, "--rows", str(rows), "--dtypes", dtype]
        command += ["--device", bench.arguments.device]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for name, extra in found.items():
        share = extra / found["unfused fp32 loss"]
        line = {"bench": bench.name, "run": bench.run, "case": f"extra memory, {rows} x {VOCABULARY}, {dtype}"}
        figures = {"contender": name, "extra_mb": extra, "share": share, "torch": torch.__version__}
        write_line(Path(bench.arguments.results) / f"{bench.name}.jsonl", {**line, **figures, **machine()})
        print(f"extra memory, {rows} rows, {dtype}  {name:28} {extra:8.1f} MB  {share:.3f}", flush=True)


def peak_extra_mb(arguments: argparse.Namespace) -> float:
    """MB beyond inputs and resulting gradients."""
    loss = LOSSES[arguments.one]
    torch.set_num_threads(1)
    x, weight, target = inputs(arguments.dtypes, 32, arguments.device, 4096)
    loss(x, weight, target).backward()  # compile, allocate workspaces
    x, weight, target = inputs(arguments.dtypes, int(arguments.rows), arguments.device)
    gradients = (x.nbytes + weight.nbytes) / 1e6
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
        loss(x, weight, target).backward()
        return torch.cuda.max_memory_allocated() / 1e6 - before - gradients
    peak, before = peak_rss_mb(lambda: loss(x, weight, target).backward())
    return peak - before - gradients


if __name__ == "__main__":
    main()
