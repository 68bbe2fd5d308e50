"""ds-kernels: one Muon step over the matrices of some SmolLM2 layers in fp32, against torch.optim.Muon.

Both take five Newton-Schulz steps. torch always takes them in bf16; ours by default in fp32 on a CPU, or in bf16
(`ns_dtype`), on the Gram matrix of the shorter side where that is less work (`gram`, the default) or not (`classic`).
It is the products that count here: the lines say how many flops the classic form has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _kernels import KernelBench, options

from ds_kernels.optim import Muon

LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
STEPS = 5


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    bench = KernelBench("kernels_muon", arguments)
    for _ in bench.threads():
        calls = {
            "ours": contender(arguments, lambda p: Muon(p, lr=1e-5)),
            "ours, bf16": contender(arguments, lambda p: Muon(p, lr=1e-5, ns_dtype=torch.bfloat16)),
            "ours, classic, bf16": contender(
                arguments, lambda p: Muon(p, lr=1e-5, ns_method="classic", ns_dtype=torch.bfloat16)
            ),
            "torch.optim.Muon": contender(arguments, lambda p: torch.optim.Muon(p, lr=1e-5)),
        }
        medians = bench.compare(
            f"muon, {arguments.layers} layers of SmolLM2, fp32", calls, flops=arguments.layers * layer_flops()
        )
        ratios = [f"{name} {medians['torch.optim.Muon'] / seconds:.2f} x" for name, seconds in medians.items()]
        print(f"    as fast as torch: {', '.join(ratios[:-1])}", flush=True)


def contender(
    arguments: argparse.Namespace, make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
) -> Callable[[], object]:
    """A step over matrices of its own, on the same values and gradients."""
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for shape in LAYER * arguments.layers:
        p = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(arguments.device))
        p.grad = torch.randn(shape, generator=generator).to(arguments.device)
        matrices.append(p)
    optimizer = make(matrices)
    return lambda: optimizer.step()


def layer_flops() -> int:
    """Of the plain form, over one layer's matrices: X X^T, its square, and their sum times X, per step."""
    total = 0
    for rows, columns in LAYER:
        short, long = min(rows, columns), max(rows, columns)
        total += STEPS * 2 * (2 * short * short * long + short**3)
    return total


if __name__ == "__main__":
    main()
