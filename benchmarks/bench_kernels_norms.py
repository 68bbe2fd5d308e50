"""rms_norm and layer_norm, alone and with the residual added, against torch's: forward, and forward with backward.

GB/s count what must cross memory (the docstrings' limits: forward 2 passes over the tensor, 4 with a residual; backward
3, with a residual 4), `share` is that over the triad's bandwidth on as many threads. One case exceeds the caches, the
other is a SmolLM2 layer's input (1,024 tokens of 576). With CUDA the same cases run there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _kernels import Call, KernelBench, options, triad
from torch import Tensor

from ds_kernels import layer_norm, rms_norm

SIZES = {"large": {torch.bfloat16: (8192, 1536), torch.float32: (4096, 1536)}, "smollm2": {torch.bfloat16: (1024, 576)}}
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]


def hugging_face(x: Tensor, weight: Tensor) -> Tensor:
    """The norm of transformers' Llama."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def added(norm: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total), total


# operation -> contender -> function of x, residual, weight, bias
CASES: dict[str, dict[str, Function]] = {
    "rms_norm": {
        "ours": lambda x, r, w, b: rms_norm(x, w, 1e-6),
        "torch": lambda x, r, w, b: F.rms_norm(x, (x.shape[-1],), w, 1e-6),
        "transformers": lambda x, r, w, b: hugging_face(x, w),
    },
    "rms_norm+residual": {
        "ours": lambda x, r, w, b: rms_norm(x, w, 1e-6, residual=r),
        "torch": lambda x, r, w, b: added(lambda t: F.rms_norm(t, (x.shape[-1],), w, 1e-6), x, r),
        "transformers": lambda x, r, w, b: added(lambda t: hugging_face(t, w), x, r),
    },
    "layer_norm": {
        "ours": lambda x, r, w, b: layer_norm(x, w, b, 1e-5),
        "torch": lambda x, r, w, b: F.layer_norm(x, (x.shape[-1],), w, b, 1e-5),
    },
    "layer_norm+residual": {
        "ours": lambda x, r, w, b: layer_norm(x, w, b, 1e-5, residual=r),
        "torch": lambda x, r, w, b: added(lambda t: F.layer_norm(t, (x.shape[-1],), w, b, 1e-5), x, r),
    },
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    bench = KernelBench("kernels_norms", arguments)
    for _ in bench.threads():
        bandwidth = triad() / 1e9 if arguments.device == "cpu" else 0.0
        for size, shapes in SIZES.items():
            for dtype, shape in shapes.items():
                for operation, contenders in CASES.items():
                    measure(bench, operation, contenders, f"{size} {shape[0]}x{shape[1]}", dtype, shape, bandwidth)


def measure(
    bench: KernelBench,
    operation: str,
    contenders: dict[str, Function],
    label: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    bandwidth: float,
) -> None:
    """Forward alone, then forward and backward."""
    device = bench.arguments.device
    x, residual, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
    fused, nbytes = "residual" in operation, x.numel() * x.element_size()
    name = str(dtype).removeprefix("torch.")

    def forward(function: Function) -> Call:
        def call() -> None:
            with torch.no_grad():
                function(x, residual, weight, bias)
            synchronize(device)

        return call

    def both(function: Function) -> Call:
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
        used = [leaf for leaf, needed in zip(leaves, (True, fused, True, "layer" in operation), strict=True) if needed]

        def call() -> None:
            out = function(*leaves)
            outputs = list(out) if isinstance(out, tuple) else [out]
            torch.autograd.grad(outputs, used, [grad] * len(outputs))
            synchronize(device)

        return call

    for part, make, passes in (("forward", forward, 4 if fused else 2), ("forward+backward", both, 8 if fused else 5)):
        medians = bench.compare(
            f"{operation} {label} {name} {part}", {who: make(function) for who, function in contenders.items()},
            nbytes=passes * nbytes, dtype=name, triad_gb_per_s=bandwidth,
        )  # fmt: skip
        report(medians, passes * nbytes, bandwidth)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def report(medians: dict[str, float], nbytes: float, bandwidth: float) -> None:
    share = f"{nbytes / medians['ours'] / 1e9 / bandwidth:.0%} of the triad, " if bandwidth else ""
    ratios = ", ".join(f"{t / medians['ours']:.2f} x {who}" for who, t in medians.items() if who != "ours")
    print(f"    {share}{ratios}", flush=True)


if __name__ == "__main__":
    main()
