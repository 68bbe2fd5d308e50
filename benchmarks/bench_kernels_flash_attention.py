"""flash_attention against torch's scaled_dot_product_attention: forward, and forward with backward.

GF/s counts what is visible: 4 * heads * dim per visible pair of query and key forward, 14 with the backward pass.
A sliding window is a boolean mask to torch, packed sequences are a loop over them.
"""

from __future__ import annotations

import _kernels
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ds_kernels import flash_attention

CASES = {  # batch, heads, kv_heads, len, dim, causal, window
    "causal": (1, 9, 3, 2048, 64, True, None),
    "causal, short": (4, 9, 3, 512, 64, True, None),
    "full": (1, 9, 3, 2048, 64, False, None),
    "causal, dim 128": (1, 8, 8, 2048, 128, True, None),
    "window 256": (1, 9, 3, 2048, 64, True, 256),
}
PACKED = [100, 900, 30, 500, 300, 218]


def torch_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    place = torch.arange(q.shape[2], device=q.device)
    ahead = place[None, :] - place[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=(ahead <= 0) & (ahead > -window), enable_gqa=True)


def torch_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(*(x.split(PACKED, 2) for x in (q, k, v)), strict=True)
    return torch.cat([scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts], 2)


def main() -> None:
    arguments = _kernels.options(__doc__).parse_args()
    bench = _kernels.KernelBench("kernels_flash_attention", arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for threads in bench.threads():
        for dtype in (torch.float32, torch.bfloat16):
            for name, (batch, heads, kv_heads, length, dim, causal, window) in CASES.items():
                q = torch.randn(batch, length, heads, dim, device=device).to(dtype).transpose(1, 2)
                k, v = (
                    torch.randn(batch, length, kv_heads, dim, device=device).to(dtype).transpose(1, 2) for _ in "kv"
                )
                if window is None:
                    peer = lambda q=q, k=k, v=v, causal=causal: scaled_dot_product_attention(  # noqa: E731
                        q, k, v, is_causal=causal, enable_gqa=True
                    )
                    pairs = length * (length + 1) / 2 if causal else length * length
                else:
                    peer = lambda q=q, k=k, v=v, window=window: torch_window(q, k, v, window)  # noqa: E731
                    pairs = length * window - window * (window - 1) / 2
                own = lambda q=q, k=k, v=v, causal=causal, window=window: flash_attention(  # noqa: E731
                    q, k, v, causal=causal, window=window
                )
                compare(bench, f"{name}, {str(dtype)[6:]}", own, peer, (q, k, v), 4.0 * batch * heads * dim * pairs)
            starts = torch.tensor([0, *torch.tensor(PACKED).cumsum(0)], device=device)
            q, k, v = (torch.randn(1, sum(PACKED), h, 64, device=device).to(dtype).transpose(1, 2) for h in (9, 3, 3))
            pairs = sum(n * (n + 1) / 2 for n in PACKED)

            def packed(q: Tensor = q, k: Tensor = k, v: Tensor = v, starts: Tensor = starts) -> Tensor:
                found: Tensor = flash_attention(
                    *(x[0].transpose(0, 1) for x in (q, k, v)), causal=True, cu_seqlens_q=starts, max_seqlen_q=900
                )
                return found.transpose(0, 1)[None]

            peer = lambda q=q, k=k, v=v: torch_packed(q, k, v)  # noqa: E731
            compare(bench, f"packed, causal, {str(dtype)[6:]}", packed, peer, (q, k, v), 4.0 * 9 * 64 * pairs)
        print(f"{threads} threads done", flush=True)


def compare(bench, case, own, peer, leaves, flops) -> None:  # type: ignore[no-untyped-def]
    """Time both ways forward and forward with backward; the results are equal."""
    torch.testing.assert_close(own(), peer(), rtol=2e-2, atol=2e-2)

    def synchronised(call):  # type: ignore[no-untyped-def]
        def run() -> None:
            call()
            if leaves[0].is_cuda:
                torch.cuda.synchronize()

        return run

    def trained(call):  # type: ignore[no-untyped-def]
        def run() -> None:
            for leaf in leaves:
                leaf.requires_grad_()
            out = call()
            torch.autograd.grad(out, leaves, grad)
            for leaf in leaves:
                leaf.requires_grad_(False)

        return run

    grad = torch.randn_like(leaves[0])
    calls = {"ds_kernels": own, "torch sdpa": peer}
    for what, wrap, factor in (("forward", lambda call: call, 1.0), ("forward + backward", trained, 3.5)):
        medians = bench.compare(
            f"{case}: {what}",
            {name: synchronised(wrap(call)) for name, call in calls.items()},
            gflop=flops * factor / 1e9,
        )
        rates = ", ".join(f"{name} {flops * factor / seconds / 1e9:.0f} GF/s" for name, seconds in medians.items())
        print(f"    {rates}; ratio {medians['torch sdpa'] / medians['ds_kernels']:.2f}", flush=True)


if __name__ == "__main__":
    main()
