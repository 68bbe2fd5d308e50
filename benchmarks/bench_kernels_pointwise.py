"""swiglu, geglu, bias_gelu, bias_dropout_residual, softmax and rope against torch's compositions of the same.

Forward, and forward with backward. GB/s count what must cross memory (the limits in the docstrings of the operations),
`share` is that over the triad's bandwidth on as many threads. Tensors are larger than the caches together. With CUDA
the same cases run there. `--ops swiglu,rope` chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _kernels import Call, KernelBench, options, triad
from bench_kernels_norms import report, synchronize
from torch import Tensor

from ds_kernels import bias_dropout_residual, bias_gelu, geglu, rope, softmax, swiglu

DROPOUT = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation: its inputs, contenders as functions of them, passes over the first input (forward, backward)."""

    inputs: list[Tensor]
    contenders: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    passes: tuple[float, float]
    constants: tuple[Tensor, ...] = ()


def cases(dtype: torch.dtype, device: str) -> dict[str, Case]:
    """Of one dtype. Tensors have 25 MB each."""
    rows, dim = (8192 if dtype == torch.bfloat16 else 4096), 1536

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def heads(count: int) -> Tensor:  # as a projection leaves them
        return some(4, rows // 4, count, 64).transpose(1, 2)

    angles = torch.outer(torch.arange(rows // 4.0), 1e4 ** -(torch.arange(32) / 32)).to(device)
    cos, sin = angles.cos(), angles.sin()
    mask = torch.rand(8, 1, 1, 512, device=device) > 0.2
    pairs, biased = [some(rows, dim), some(rows, dim)], [some(rows, dim), some(dim)]
    return {
        "swiglu": Case(pairs, {"ours": swiglu, "torch": lambda g, u: F.silu(g) * u}, (3, 5)),
        "geglu erf": Case(pairs, {"ours": geglu, "torch": lambda g, u: F.gelu(g) * u}, (3, 5)),
        "geglu tanh": Case(
            pairs,
            {"ours": lambda g, u: geglu(g, u, "tanh"), "torch": lambda g, u: F.gelu(g, approximate="tanh") * u},
            (3, 5),
        ),
        "bias_gelu erf": Case(biased, {"ours": bias_gelu, "torch": lambda x, b: F.gelu(x + b)}, (2, 3)),
        "bias_gelu tanh": Case(
            biased,
            {"ours": lambda x, b: bias_gelu(x, b, "tanh"), "torch": lambda x, b: F.gelu(x + b, approximate="tanh")},
            (2, 3),
        ),
        "bias_dropout_residual": Case(
            [*biased, some(rows, dim)],
            {
                "ours": lambda x, b, r: bias_dropout_residual(x, b, r, DROPOUT),
                "torch": lambda x, b, r: r + F.dropout(x + b, DROPOUT),
            },
            (3, 2),
        ),
        "softmax padding mask": Case(
            [some(8, rows // 512, 3 * 64, 512)],
            {
                "ours": lambda x, m: softmax(x, m, 0.125),
                "torch": lambda x, m: torch.softmax((x * 0.125).masked_fill(~m, -torch.inf), -1),
            },
            (2, 3),
            (mask,),
        ),
        "softmax causal": Case(
            [some(rows // 512 * 3, 512, 512)],
            {
                "ours": lambda x, m: softmax(x, scale=0.125, causal=True),
                "torch": lambda x, m: torch.softmax((x * 0.125).masked_fill(m, -torch.inf), -1),
            },
            (1.5, 2),
            (torch.ones(512, 512, dtype=torch.bool, device=device).triu(1),),
        ),
        "rope 18+6 heads": Case(
            [heads(18), heads(6)],
            {"ours": lambda q, k, c, s: rope(q, k, c, s), "transformers": hugging_face},
            (2 * 24 / 18, 2 * 24 / 18),
            (cos, sin),
        ),
    }  # fmt: skip


def hugging_face(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """rope of transformers' Llama."""
    c, s = (torch.cat([table, table], -1).to(q.dtype) for table in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * c + torch.cat([-second, first], -1) * s

    return turned(q), turned(k)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", default="", help="comma-separated parts of the operations' names")
    arguments = parser.parse_args()
    bench = KernelBench("kernels_pointwise", arguments)
    for _ in bench.threads():
        bandwidth = triad() / 1e9 if arguments.device == "cpu" else 0.0
        for dtype in (torch.bfloat16, torch.float32):
            for name, case in cases(dtype, arguments.device).items():
                if any(part in name for part in arguments.ops.split(",")):
                    measure(bench, f"{name} {str(dtype).removeprefix('torch.')}", case, bandwidth)


def measure(bench: KernelBench, name: str, case: Case, bandwidth: float) -> None:
    """Forward alone, then forward and backward."""
    device, first = bench.arguments.device, case.inputs[0]
    nbytes = first.numel() * first.element_size()

    def forward(function: Callable[..., object]) -> Call:
        def call() -> None:
            with torch.no_grad():
                function(*case.inputs, *case.constants)
            synchronize(device)

        return call

    def both(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Call:
        leaves = [t.detach().requires_grad_() for t in case.inputs]
        with torch.no_grad():
            shaped = function(*case.inputs, *case.constants)
        grads = [torch.randn_like(t) for t in (shaped if isinstance(shaped, tuple) else (shaped,))]

        def call() -> None:
            out = function(*leaves, *case.constants)
            torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, grads)
            synchronize(device)

        return call

    for part, make, passes in (("forward", forward, case.passes[0]), ("forward+backward", both, sum(case.passes))):
        calls = {who: make(function) for who, function in case.contenders.items()}
        medians = bench.compare(f"{name} {part}", calls, nbytes=passes * nbytes, triad_gb_per_s=bandwidth)
        report(medians, passes * nbytes, bandwidth)


if __name__ == "__main__":
    main()
