"""linear with bf16, int8 and int4 weights against torch's, and against what the memory delivers in the same run.

Each timed call walks a ring of distinct weights larger than every cache, as a model's layers do, with one activation
block; seconds are per walk, GB/s count the packed weights (scales included) once. `share` is that over the triad's
bandwidth on as many threads. Shapes are SmolLM2-135M's layers and head, and 4096 x 4096; with CUDA the same cases run
there (`python bench_kernels_linear.py --device cuda`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from _kernels import Call, KernelBench, options, triad
from torch import Tensor

from ds_kernels import QuantizedWeight, bind_linear, linear, quantize_weight

SHAPES = {
    "kv 192x576": (192, 576),
    "q,o 576x576": (576, 576),
    "gate,up 1536x576": (1536, 576),
    "down 576x1536": (576, 1536),
    "head 49152x576": (49152, 576),
    "4096x4096": (4096, 4096),
}
RING_NBYTES = 96 << 20


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="1,4,8", help="comma-separated activation rows (few: a ring of weights)")
    parser.add_argument("--many", default="64,512", help="comma-separated activation rows (many: one weight)")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated part of the shapes")
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()
    bench = KernelBench("kernels_linear", arguments)
    chosen = [name for name in SHAPES if any(part in name for part in arguments.shapes.split(","))]
    for threads in bench.threads():
        bandwidth = triad() / 1e9 if arguments.device == "cpu" else 0.0
        print(f"triad, {threads} threads: {bandwidth:.1f} GB/s", flush=True)
        for name in chosen:
            for rows in [int(part) for part in arguments.rows.split(",") if part]:
                few_rows(bench, name, rows, bandwidth)
            for rows in [int(part) for part in arguments.many.split(",") if part]:
                if SHAPES[name][0] < 10000 and SHAPES[name][1] < 4000:
                    many_rows(bench, name, rows)


def few_rows(bench: KernelBench, name: str, rows: int, bandwidth: float) -> None:
    """Bandwidth of a walk over weights that no cache holds."""
    arguments: argparse.Namespace = bench.arguments
    outputs, columns = SHAPES[name]
    x = torch.randn(rows, columns, device=arguments.device).bfloat16()
    weight = torch.randn(outputs, columns, device=arguments.device) / columns**0.5
    for kind, (nbytes, walks) in formats(weight, x, arguments.group_size).items():
        count = max(1, RING_NBYTES // nbytes)
        calls = {contender: walk(make(count)) for contender, make in walks.items()}
        facts = {"rows": rows, "weights": kind, "ring": count, "triad_gb_per_s": bandwidth}
        medians = bench.compare(f"{name} {kind}, {rows} rows", calls, nbytes=nbytes * count, **facts)
        if bandwidth:
            shares = [f"{c} {nbytes * count / s / 1e9 / bandwidth:.0%}" for c, s in medians.items()]
            print(f"    share of the triad: {', '.join(shares)}")


def walk(calls: list[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


Ring = Callable[[int], list[Call]]


def formats(weight: Tensor, x: Tensor, group_size: int) -> dict[str, tuple[int, dict[str, Ring]]]:
    """Weight format -> (bytes of one packed weight, contender -> calls over `count` copies of it)."""
    outputs, columns = weight.shape

    def bound(copy: Callable[[], Any], bits: int | None = None) -> Ring:
        y = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
        return lambda count: [bind_linear(x, copy(), y, activation_bits=bits) for _ in range(count)]

    def over(copy: Callable[[], object], use: Callable[[object], object]) -> Ring:
        def make(count: int) -> list[Call]:
            copies = [copy() for _ in range(count)]
            return [lambda one=one: use(one) for one in copies]

        return make

    dense = weight.bfloat16()
    int8, int4 = (quantize_weight(weight, bits, group_size=group_size) for bits in (8, 4))
    found: dict[str, tuple[int, dict[str, Ring]]] = {
        "bf16": (
            dense.nbytes,
            {
                "ours bound": bound(dense.clone),
                "ours": over(dense.clone, lambda w: linear(x, w)),
                "torch F.linear": over(dense.clone, lambda w: torch.nn.functional.linear(x, w)),
            },
        )
    }
    for kind, packed in (("int8", int8), ("int4", int4)):
        found[kind] = (
            packed.nbytes,
            {
                "ours bound A16": bound(lambda packed=packed: clone(packed)),
                "ours bound A8": bound(lambda packed=packed: clone(packed), 8),
                "ours A16": over(lambda packed=packed: clone(packed), lambda w: linear(x, w)),
                "ours A8": over(lambda packed=packed: clone(packed), lambda w: linear(x, w, activation_bits=8)),
            },
        )
    if x.device.type == "cpu":
        row_scale = torch.ones(outputs, dtype=torch.bfloat16)
        plain8 = torch.randint(-127, 127, (outputs, columns), dtype=torch.int8)
        found["int8"][1]["torch _weight_int8pack_mm"] = over(
            plain8.clone, lambda w: torch.ops.aten._weight_int8pack_mm(x, w, row_scale)
        )
        codes = torch.randint(0, 16, (outputs, columns), dtype=torch.int32)
        plain4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.ones(columns // group_size, outputs, 2, dtype=torch.bfloat16)
        found["int4"][1]["torch _weight_int4pack_mm"] = over(
            plain4.clone, lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, group_size, scales)
        )
    return found


def clone(weight: QuantizedWeight) -> QuantizedWeight:
    return dataclasses.replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone())


def many_rows(bench: KernelBench, name: str, rows: int) -> None:
    """Many activation rows: arithmetic counts, against torch's bf16 product with the dense weight."""
    outputs, columns = SHAPES[name]
    device = bench.arguments.device
    x = torch.randn(rows, columns, device=device).bfloat16()
    weight = torch.randn(outputs, columns, device=device) / columns**0.5
    dense = weight.bfloat16()
    int8, int4 = (quantize_weight(weight, bits, group_size=bench.arguments.group_size) for bits in (8, 4))
    calls: dict[str, Call] = {
        "torch F.linear bf16": lambda: torch.nn.functional.linear(x, dense),
        "ours int8 A16": lambda: linear(x, int8),
        "ours int8 A8": lambda: linear(x, int8, activation_bits=8),
        "ours int4 A16": lambda: linear(x, int4),
        "ours int4 A8": lambda: linear(x, int4, activation_bits=8),
    }
    if device == "cpu":
        plain8 = torch.randint(-127, 127, (outputs, columns), dtype=torch.int8)
        row_scale = torch.ones(outputs, dtype=torch.bfloat16)
        calls["torch _weight_int8pack_mm"] = lambda: torch.ops.aten._weight_int8pack_mm(x, plain8, row_scale)
    bench.compare(f"{name}, {rows} rows", calls, rows=rows, flops=2 * rows * outputs * columns)


if __name__ == "__main__":
    main()
