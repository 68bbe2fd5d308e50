"""Thin modules over the operations: parameters and their initialisation here, every computation in `ops`.

Names of parameters are those of Hugging Face models (`weight`; `gate_proj`, `up_proj`, `down_proj`; `gate`,
`gate_up_proj` and `down_proj` of stacked experts), so that state dicts fit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_kernels._checks import require
from ds_kernels.ops.cross_entropy import cross_entropy
from ds_kernels.ops.glu import geglu, swiglu
from ds_kernels.ops.grouped_gemm import grouped_gemm
from ds_kernels.ops.layer_norm import layer_norm
from ds_kernels.ops.linear_cross_entropy import linear_cross_entropy
from ds_kernels.ops.moe_dispatch import moe_combine, moe_dispatch
from ds_kernels.ops.moe_gating import Routing, moe_capacity, moe_gate
from ds_kernels.ops.rms_norm import rms_norm
from ds_kernels.ops.rope import rope

__all__ = [
    "CrossEntropyLoss", "GatedMLP", "LayerNorm", "LinearCrossEntropyLoss", "RMSNorm", "RotaryEmbedding", "SparseMLP",
]  # fmt: skip

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class RMSNorm(nn.Module):
    """`rms_norm` with a weight [dim]; `offset` 1.0 keeps the weight around zero (Gemma)."""

    def __init__(self, dim: int, eps: float = 1e-6, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., dim] -> the same; with a residual `(y, x + residual)`."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, offset=self.offset)
        return rms_norm(x, self.weight, self.eps, offset=self.offset, residual=residual)


class LayerNorm(nn.Module):
    """`layer_norm` with a weight and, if wanted, a bias [dim]."""

    def __init__(self, dim: int, eps: float = 1e-5, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., dim] -> the same; with a residual `(y, x + residual)`."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


class GatedMLP(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)): SwiGLU with "silu", GEGLU with "gelu" or "gelu_tanh".

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202).
    """

    def __init__(self, hidden: int, intermediate: int, activation: str = "silu", *, bias: bool = False) -> None:
        super().__init__()
        _check_activation("GatedMLP", activation)
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        y: Tensor = self.down_proj(_gated(self.gate_proj(x), self.up_proj(x), self.activation))
        return y


class SparseMLP(nn.Module):
    """A mixture of gated MLPs, of which each token takes `top_k`: gate, dispatch, two grouped products, combine.

    The auxiliary losses of the last forward are in `routing` (`routing.aux_loss`, `routing.z_loss`), with gradient.
    Source: Jiang et al. 2024, "Mixtral of Experts" (arXiv:2401.04088).
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int = 2,
        activation: str = "silu",
        *,
        renormalize: bool = True,
        capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop: str = "position",
        jitter: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Experts in two stacked parameters: gate_up_proj [E, 2 * intermediate, hidden], down_proj [E, hidden, inter.].

        Args:
            hidden: of the tokens.
            intermediate: of each expert.
            num_experts: E.
            top_k: experts of a token.
            activation: "silu", "gelu" or "gelu_tanh".
            renormalize: a token's weights sum to 1.
            capacity_factor: rows of an expert per its share of the choices (see `moe_capacity`); None drops nothing.
            min_capacity: the fewest rows of an expert.
            drop: who is dropped: "position", "probability" or "random".
            jitter: in training the gate sees its input times a factor in [1 - jitter, 1 + jitter] (Switch).
            generator: of jitter and of drop="random"; None for torch's default.
        """
        super().__init__()
        _check_activation("SparseMLP", activation)
        require(0 <= jitter < 1, f"SparseMLP: jitter is {jitter}; expected a number in [0, 1)")
        require(1 <= top_k <= num_experts, f"SparseMLP: top_k is {top_k}; expected 1 to {num_experts}, the experts")
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, intermediate))
        self.top_k, self.activation, self.jitter, self.generator = top_k, activation, jitter, generator
        self.renormalize, self.drop = renormalize, drop
        self.capacity_factor, self.min_capacity = capacity_factor, min_capacity
        self.routing: Routing | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as two `nn.Linear`s start: uniform within 1 / sqrt(inputs)."""
        self.gate.reset_parameters()
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.shape[2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same; tokens that were dropped by all their experts get zeros."""
        tokens = x.reshape(-1, x.shape[-1])
        seen = tokens
        if self.training and self.jitter:
            noise = torch.rand(tokens.shape, generator=self.generator, device=x.device, dtype=torch.float32)
            seen = tokens * (1 + self.jitter * (2 * noise - 1)).to(x.dtype)
        num_experts, capacity = self.gate.out_features, None
        if self.capacity_factor is not None:
            count = tokens.shape[0]
            capacity = moe_capacity(count, num_experts, self.top_k, self.capacity_factor, self.min_capacity)
        routing = moe_gate(
            F.linear(seen, self.gate.weight), self.top_k,
            renormalize=self.renormalize, capacity=capacity, drop=self.drop, generator=self.generator,
        )  # fmt: skip
        self.routing = routing
        gate, up = grouped_gemm(moe_dispatch(tokens, routing), self.gate_up_proj, routing.ends).chunk(2, -1)
        rows = grouped_gemm(_gated(gate, up, self.activation), self.down_proj, routing.ends)
        return moe_combine(rows, routing).view(x.shape)


class RotaryEmbedding(nn.Module):
    """`rope` with tables of cosine and sine for positions up to `max_positions`, in fp32.

    Angles: position * base^(-2 i / dim) for pair i. Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864).
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, dim: int, max_positions: int = 4096, base: float = 10000.0, *, interleaved: bool = False
    ) -> None:
        super().__init__()
        require(dim > 0 and dim % 2 == 0, f"RotaryEmbedding: dim is {dim}; expected an even number of rotated elements")
        frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.arange(max_positions, dtype=torch.float64).unsqueeze(1) * frequencies
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.interleaved = interleaved

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys; shapes and positions as `rope` takes them (positions count from 0 if None)."""
        if positions is None:
            tokens = q.shape[-2]
            require(
                tokens <= self.cos.shape[0],
                f"RotaryEmbedding: {tokens} tokens; expected at most max_positions, {self.cos.shape[0]}",
            )
            return rope(q, k, self.cos[:tokens], self.sin[:tokens], self.interleaved)
        return rope(q, k, self.cos, self.sin, self.interleaved, positions=positions)


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` of logits against class indices."""

    def __init__(
        self, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.z_loss, self.reduction = z_loss, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """[..., classes] and [...] -> the loss."""
        return cross_entropy(
            logits, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, z_loss=self.z_loss,
            reduction=self.reduction,
        )  # fmt: skip


class LinearCrossEntropyLoss(CrossEntropyLoss):
    """`linear_cross_entropy`: the loss of a head `weight` on hidden states, without its logits."""

    def forward(self, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[..., hidden], [...], [classes, hidden] and [classes] -> the loss."""
        return linear_cross_entropy(
            x, weight, target, bias, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            z_loss=self.z_loss, reduction=self.reduction,
        )  # fmt: skip


def _check_activation(owner: str, activation: str) -> None:
    require(activation in ACTIVATIONS, f"{owner}: activation is {activation!r}; supported are {', '.join(ACTIVATIONS)}")


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, "tanh" if activation == "gelu_tanh" else "none")
