"""Mixture of experts and the transformer layer: gate, dispatch and combine, grouped products, whole layers.

Peers are torch compositions: `grouped_mm` and a product per expert for the products, top-k with one-hot counting for
the gate, indexing for dispatch and combine, the loop over experts that models are written with for the whole mixture,
and `nn.TransformerEncoderLayer` for the layer (post-norm, erf gelu, no dropout, the same sizes as BERT-base). Forward
alone for products of few rows (decoding), else with backward. GB/s of those products count the weights once. With
CUDA the same cases run there. `--cases gate,products` chooses.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from _kernels import Call, KernelBench, options, triad
from torch import Tensor, nn
from torch.nn import functional as F

from ds_kernels import grouped_gemm, moe_combine, moe_dispatch, moe_gate
from ds_kernels.nn import SparseMLP
from ds_kernels.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

HIDDEN, INNER, EXPERTS, TOP_K = 576, 1024, 32, 4


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default="gate,rows,products,decode,mixture,layer")
    arguments = parser.parse_args()
    bench = KernelBench("kernels_moe", arguments)
    for _ in bench.threads():
        for name in arguments.cases.split(","):
            CASES[name](bench, arguments)


def calls(contenders: dict[str, Callable[[], Tensor]], leaves: list[Tensor]) -> dict[str, Call]:
    """Forward and backward of each, waiting for a GPU."""

    def call(contender: Callable[[], Tensor]) -> None:
        y = contender()
        torch.autograd.grad(y, leaves, torch.ones_like(y))
        if y.is_cuda:
            torch.cuda.synchronize()

    return {name: (lambda contender=contender: call(contender)) for name, contender in contenders.items()}


def gate(bench: KernelBench, arguments: argparse.Namespace) -> None:
    """Routing of 4,096 tokens, losses included."""
    for experts, top_k in ((8, 2), (64, 8)):
        logits = torch.randn(4096, experts, device=arguments.device, requires_grad=True)

        def ours(logits: Tensor = logits, top_k: int = top_k) -> Tensor:
            routing = moe_gate(logits, top_k)
            return routing.weights.sum() + routing.aux_loss + routing.z_loss

        def composed(logits: Tensor = logits, top_k: int = top_k, experts: int = experts) -> Tensor:
            probs = torch.softmax(logits, -1)
            weights, chosen = probs.topk(top_k)
            weights = weights / weights.sum(-1, keepdim=True)
            counts = F.one_hot(chosen, experts).sum((0, 1))
            chosen.flatten().argsort(stable=True)
            aux = experts / top_k * (probs.mean(0) * counts / logits.shape[0]).sum()
            return weights.sum() + aux + torch.logsumexp(logits, -1).square().mean()

        bench.compare(f"gate 4096 x {experts}, top {top_k}", calls({"ours": ours, "torch": composed}, [logits]))


def rows(bench: KernelBench, arguments: argparse.Namespace) -> None:
    """Tokens to rows and back, bf16."""
    routing = moe_gate(torch.randn(2048, EXPERTS, device=arguments.device), TOP_K)
    x = torch.randn(2048, HIDDEN, device=arguments.device).bfloat16().requires_grad_()
    token = routing.sources // TOP_K
    weights = routing.weights.flatten()[routing.sources].unsqueeze(1).bfloat16()

    def indexed() -> Tensor:
        return torch.zeros_like(x).index_add(0, token, x[token] * weights)

    contenders = {"ours": lambda: moe_combine(moe_dispatch(x, routing), routing), "torch indexing": indexed}
    bench.compare(f"dispatch and combine 2048 x {HIDDEN} bf16, top {TOP_K}", calls(contenders, [x]))


def grouped(
    device: str, dtype: torch.dtype, tokens: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Callable[[], Tensor]]]:
    """Rows, weights and ends of a routing, and the products of them."""
    ends = moe_gate(torch.randn(tokens, EXPERTS, device=device), TOP_K).ends
    x = torch.randn(tokens * TOP_K, HIDDEN, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(EXPERTS, INNER, HIDDEN, device=device) / 24).to(dtype).requires_grad_()

    def loop() -> Tensor:
        limits = [0, *ends.tolist()]
        return torch.cat([F.linear(x[limits[e] : limits[e + 1]], weight[e]) for e in range(EXPERTS)])

    contenders = {
        "ours": lambda: grouped_gemm(x, weight, ends),
        "torch grouped_mm": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends),
        "torch linear per expert": loop,
    }
    return x, weight, ends, contenders


def products(bench: KernelBench, arguments: argparse.Namespace) -> None:
    """Many rows: compute."""
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, _, contenders = grouped(arguments.device, dtype, 512)
        bench.compare(
            f"grouped gemm 2048 rows, {EXPERTS} x {HIDDEN} x {INNER} {dtype}",
            calls(contenders, [x, weight]),
            flops=3 * 2 * x.shape[0] * HIDDEN * INNER,
        )


def decode(bench: KernelBench, arguments: argparse.Namespace) -> None:
    """Few rows, forward: the weights' way from memory."""
    bandwidth = triad() if arguments.device == "cpu" else 0.0
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (4, 16):
            _, weight, ends, contenders = grouped(arguments.device, dtype, tokens)
            used = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())
            with torch.no_grad():
                bench.compare(
                    f"grouped gemm of {tokens} tokens, {used} experts {dtype}",
                    contenders,
                    nbytes=used * HIDDEN * INNER * weight.itemsize,
                    triad=bandwidth,
                )


def mixture(bench: KernelBench, arguments: argparse.Namespace) -> None:
    """A whole sparse MLP, bf16."""
    mlp = SparseMLP(HIDDEN, INNER, EXPERTS, TOP_K).to(arguments.device, torch.bfloat16)
    x = torch.randn(512, HIDDEN, device=arguments.device).bfloat16().requires_grad_()

    def loop() -> Tensor:
        weights, chosen = torch.softmax(mlp.gate(x).float(), -1).topk(TOP_K)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], mlp.gate_up_proj[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, mlp.down_proj[expert])
            out = out.index_add(0, token, y * weights[token, choice].unsqueeze(1))
        return out

    contenders = {"ours": lambda: mlp(x), "loop over experts": loop}
    bench.compare(f"sparse mlp 512 tokens, {EXPERTS} experts bf16", calls(contenders, [x, *mlp.parameters()]))


def layer(bench: KernelBench, arguments: argparse.Namespace) -> None:
    """One layer of BERT-base on 4 x 128 tokens."""
    for dtype in (torch.bfloat16, torch.float32):
        config = DeepSpeedTransformerConfig(hidden_size=768, heads=12, pre_layer_norm=False)
        ours = DeepSpeedTransformerLayer(config).to(arguments.device, dtype)
        plain = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True).to(arguments.device, dtype)
        x = torch.randn(4, 128, 768, device=arguments.device).to(dtype).requires_grad_()
        bench.compare(
            f"layer 4 x 128 x 768 {dtype}",
            {
                **calls({"ours": functools.partial(ours, x)}, [x, *ours.parameters()]),
                **calls({"torch encoder layer": functools.partial(plain, x)}, [x, *plain.parameters()]),
            },
        )


CASES = {"gate": gate, "rows": rows, "products": products, "decode": decode, "mixture": mixture, "layer": layer}

if __name__ == "__main__":
    main()
