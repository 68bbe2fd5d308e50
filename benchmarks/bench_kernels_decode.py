"""A whole decoder, one token of each sequence: one launch for all layers, against the composition of our operations.

A random model of SmolLM2-135M's sizes (30 layers, hidden 576, 9 heads over 3, MLP 1536, vocabulary 49152, tied head):
weights in bf16, int8 and int4, 1 and 8 sequences, a context of `--context` tokens in pages of 16. `roofline_s` is the
time that the weights' bytes (scales included, a tied embedding once) take at the triad's bandwidth, measured in the
same run on as many threads; the share printed is that over the median. `logits_error` is the largest difference from
the specification over the largest logit, both with the packed weights.
"""

from __future__ import annotations

from typing import Any

import torch
from _kernels import KernelBench, options, triad
from torch import Tensor

from ds_kernels import (
    DecodeLayer,
    DecodeModel,
    Norm,
    Projection,
    QuantizedWeight,
    RopeTable,
    bind_decode,
    quantize_weight,
)
from ds_kernels.ops.decode import composed, reference

HIDDEN, HEADS, KV_HEADS, DIM, INNER, VOCABULARY, PAGE = 576, 9, 3, 64, 1536, 49152, 16


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--context", type=int, default=96, help="keys of every sequence, the new one included")
    parser.add_argument("--rows", default="1,8", help="comma-separated numbers of sequences")
    parser.add_argument(
        "--formats", default="bf16,int8,int8 A8,int4,int4 A8", help="comma-separated part of the formats"
    )
    arguments = parser.parse_args()
    bench = KernelBench("kernels_decode", arguments)
    formats = arguments.formats.split(",")
    models = {name: build(arguments.layers, name[:4]) for name in {each[:4] for each in formats}}
    for threads in bench.threads():
        bandwidth = triad()
        print(f"triad, {threads} threads: {bandwidth / 1e9:.1f} GB/s", flush=True)
        for rows in [int(part) for part in arguments.rows.split(",")]:
            for name in formats:
                step(bench, models[name[:4]], name, rows, bandwidth)


def build(layers: int, kind: str) -> DecodeModel:
    """Random weights of SmolLM2-135M's shapes."""
    generator = torch.Generator().manual_seed(0)

    def matrix(outputs: int, columns: int) -> Any:
        weight = torch.randn(outputs, columns, generator=generator) / columns**0.5
        if kind == "bf16":
            return weight.bfloat16()
        return quantize_weight(weight, 8 if kind == "int8" else 4, group_size=64)

    def norm() -> Norm:
        return Norm((torch.rand(HIDDEN, generator=generator) + 0.5).bfloat16())

    angles = torch.arange(8192)[:, None] * 1e5 ** -(torch.arange(DIM // 2) / (DIM // 2))[None]
    rope = RopeTable(angles.cos(), angles.sin())
    stack = [
        DecodeLayer(
            norm(),
            Projection(matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)),
            Projection(matrix(HIDDEN, HEADS * DIM)),
            norm(),
            Projection(matrix(2 * INNER, HIDDEN)),
            Projection(matrix(HIDDEN, INNER)),
            rope=rope,
        )
        for _ in range(layers)
    ]
    embedding = matrix(VOCABULARY, HIDDEN)
    return DecodeModel(embedding, stack, norm(), Projection(embedding), HEADS, KV_HEADS, DIM, "silu", True)


def nbytes(model: DecodeModel) -> int:
    """Of what a token reads."""
    weights: list[Tensor | QuantizedWeight] = [model.head.weight]
    for layer in model.layers:
        weights += [p.weight for p in (layer.qkv, layer.output, layer.up, layer.down)]
    return sum(weight.nbytes for weight in weights)


def step(bench: KernelBench, model: DecodeModel, name: str, rows: int, bandwidth: float) -> None:
    """One decoding step, the same again and again: it writes the same keys and values."""
    context, pages = bench.arguments.context, -(-bench.arguments.context // PAGE)
    shape = (rows * pages, KV_HEADS, PAGE, DIM)
    caches = [[torch.randn(shape).bfloat16() for _ in model.layers] for _ in range(2)]
    tables = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
    slots = tables[:, (context - 1) // PAGE].long() * PAGE + (context - 1) % PAGE
    lengths = torch.full((rows,), context, dtype=torch.int32)
    inputs = (torch.randint(0, VOCABULARY, (rows,)), lengths.long() - 1, slots, tables, lengths)
    program = bind_decode(model, *caches, rows, activation_bits=8 if name.endswith("A8") else None)
    got, expected = program(*inputs).clone(), reference.decode(model, *inputs, *caches)
    error = float((got - expected).abs().max() / expected.abs().max())
    roofline = nbytes(model) / bandwidth
    facts = {"rows": rows, "weights": name, "context": context, "triad_gb_per_s": bandwidth / 1e9}
    calls: dict[str, Any] = {"ours, one launch": lambda: program(*inputs)}
    if not name.endswith("A8"):
        calls["ours, composed"] = lambda: composed.decode(model, *inputs, *caches)
    medians = bench.compare(
        f"SmolLM2-135M {name}, {rows} rows",
        calls,
        nbytes=nbytes(model),
        roofline_s=roofline,
        logits_error=error,
        **facts,
    )
    share = roofline / medians["ours, one launch"]
    print(f"    roofline {roofline * 1e3:.2f} ms, share {share:.0%}, logits off by {error:.1e}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
