"""paged_attention while decoding, against torch's scaled_dot_product_attention over the gathered pages, and the triad.

GB/s counts keys and values once. `torch, gathered` copies every context out of its pages first, as an engine without a
paged kernel must; `torch, contiguous` has them in one tensor already: what paging costs. The prefill case is a chunk
of 256 tokens behind a context, among decoding sequences.
"""

from __future__ import annotations

import _kernels
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ds_kernels import paged_attention, write_kv

PAGE = 16
CASES = {  # sequences, context, heads, kv_heads, dim
    "SmolLM2, 1 x 8192": (1, 8192, 9, 3, 64),
    "SmolLM2, 32 x 2048": (32, 2048, 9, 3, 64),
    "Llama 8B, 8 x 2048": (8, 2048, 32, 8, 128),
}


class Case:
    """Sequences of one length in shuffled pages, larger than the caches where it can be."""

    def __init__(self, sequences: int, context: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        per = context // PAGE
        self.k, self.v = (torch.randn(sequences * per, kv_heads, PAGE, dim, device=device).to(dtype) for _ in range(2))
        self.tables = torch.randperm(sequences * per, device=device).view(sequences, per).int()
        self.lengths = torch.full((sequences,), context, dtype=torch.int32, device=device)
        self.q = torch.randn(sequences, heads, dim, device=device).to(dtype)
        self.whole = [self.gather(cache).contiguous() for cache in (self.k, self.v)]
        self.nbytes = 2.0 * self.k.numel() * self.k.element_size()

    def gather(self, cache: Tensor) -> Tensor:
        """[sequences, kv_heads, context, dim]."""
        return cache[self.tables.long()].transpose(1, 2).flatten(2, 3)

    def own(self) -> Tensor:
        return paged_attention(self.q, self.k, self.v, self.tables, self.lengths)

    def contiguous(self) -> Tensor:
        return scaled_dot_product_attention(self.q[:, :, None], *self.whole, enable_gqa=True)[:, :, 0]

    def gathered(self) -> Tensor:
        k, v = self.gather(self.k), self.gather(self.v)
        return scaled_dot_product_attention(self.q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def main() -> None:
    arguments = _kernels.options(__doc__).parse_args()
    bench = _kernels.KernelBench("kernels_paged_attention", arguments)
    for _ in bench.threads():
        triad = _kernels.triad() / 1e9
        print(f"triad {triad:.1f} GB/s", flush=True)
        for dtype in (torch.bfloat16, torch.float32):
            for name, sizes in CASES.items():
                case = Case(*sizes, dtype)
                torch.testing.assert_close(case.own(), case.contiguous(), rtol=2e-2, atol=2e-2)
                contenders = {
                    "ds_kernels": case.own, "torch, contiguous": case.contiguous, "torch, gathered": case.gathered
                }  # fmt: skip
                medians = bench.compare(
                    f"decode, {name}, {str(dtype)[6:]}", contenders, nbytes=case.nbytes, triad_gb_per_s=triad
                )
                print(f"    {case.nbytes / medians['ds_kernels'] / 1e9 / triad:.2f} of the triad", flush=True)
        mixed(bench)


def mixed(bench: _kernels.KernelBench) -> None:
    """A chunk of a prompt among decoding sequences, and writing its keys."""
    case = Case(8, 1024, 9, 3, 64, torch.bfloat16)
    device = case.q.device
    chunk = torch.randn(7 + 256, 9, 64, dtype=torch.bfloat16, device=device)
    starts = torch.tensor([*range(8), 7 + 256], device=device)
    new = torch.randn(2, 256, 3, 64, dtype=torch.bfloat16, device=device)
    places = torch.arange(256, device=device)
    slots = case.tables[7].long()[-16:][places // PAGE] * PAGE + places % PAGE

    def attend() -> Tensor:
        return paged_attention(chunk, case.k, case.v, case.tables, case.lengths, cu_seqlens_q=starts, max_seqlen_q=256)

    name = "256 new tokens behind 768, and 7 sequences decoding, SmolLM2, bfloat16"
    bench.compare(name, {"ds_kernels": attend})
    bench.compare("write_kv, 256 tokens", {"ds_kernels": lambda: write_kv(*new, case.k, case.v, slots)})


if __name__ == "__main__":
    main()
