"""Muon: momentum whose matrices are orthogonalised; Adam for the parameters that are no matrices.

With m the momentum, g the gradient:  m = b m + (1-b) g;  u = (1-b) g + b m (Nesterov), else m;
p -= lr (wd p + max(1, rows/cols)^0.5 NewtonSchulz(u)). Source: K. Jordan et al. 2024, "Muon: an optimizer for the
hidden layers of neural networks" (kellerjordan.github.io/posts/muon).

Newton-Schulz: X = u / |u|, five times X = (a I + b R + c R^2) X with R = X X^T, which brings every singular value near
1 (0.7 .. 1.2). "gram" iterates on R alone, R = P R P with P = a I + b R + c R^2, and multiplies all P onto X at the
end: equal in exact arithmetic, and of fewer products with the long side. It is taken where it needs less:
34 n^3 + 4 n^2 m multiply-adds against 10 n^3 + 20 n^2 m for [n, m], so from m = 1.5 n on.
Limit: compute, 20 n^2 m + 10 n^3 flops per matrix and 5 steps (classic); memory passes are negligible beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_kernels._checks import require
from ds_kernels.optim._base import Batch, FlatOptimizer, Piece, check_betas, check_rate
from ds_kernels.optim.adam import update_adam
from ds_kernels.optim.reference import round_to

__all__ = ["METHODS", "Muon", "newton_schulz"]

METHODS = ("gram", "classic")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; they maximise the slope at zero."""
GRAM_RATIO = 1.5
"""Long side over short side from which "gram" needs fewer multiplications."""
MUON_KEYS: dict[str, Any] = {
    "lr": 0.02,
    "momentum": 0.95,
    "nesterov": True,
    "weight_decay": 0.0,
    "ns_steps": 5,
    "ns_method": "gram",
}
ADAM_KEYS: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}


def newton_schulz(matrix: Tensor, steps: int = 5, method: str = "gram", dtype: torch.dtype | None = None) -> Tensor:
    """The orthogonal factor of a matrix, roughly: singular values come out between 0.7 and 1.2 (zero stays zero).

    Args:
        matrix: [..., rows, cols]; leading dimensions are a batch.
        method: "gram" or "classic", see the module.
        dtype: of the products with the long side; by default fp32 on CPU, bf16 elsewhere (fp64 stays fp64).
    """
    require(matrix.dim() >= 2, f"newton_schulz: shape {tuple(matrix.shape)}; expected at least two dimensions")
    require(method in METHODS, f"newton_schulz: method is {method!r}; supported are {', '.join(METHODS)}")
    if dtype is None:
        dtype = torch.float32 if matrix.device.type == "cpu" else torch.bfloat16
    if matrix.dtype == torch.float64:
        dtype = torch.float64
    wide = torch.promote_types(dtype, torch.float32)
    tall = matrix.size(-2) > matrix.size(-1)
    x = (matrix.mT if tall else matrix).to(wide)
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    if method == "gram" and x.size(-1) >= GRAM_RATIO * x.size(-2):
        x = _gram(x, steps, wide)
    else:
        for _ in range(steps):
            x = _polynomial(x @ x.mT).to(dtype) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def _polynomial(gram: Tensor) -> Tensor:
    """a I + b R + c R^2."""
    a, b, c = COEFFICIENTS
    result = (gram @ gram).mul_(c).add_(gram, alpha=b)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


def _gram(x: Tensor, steps: int, wide: torch.dtype) -> Tensor:
    """Newton-Schulz on R; the n x n side is kept wide, because R squares the condition."""
    gram = (x @ x.mT).to(wide)
    factor: Tensor | None = None
    for step in range(steps):
        polynomial = _polynomial(gram)
        factor = polynomial if factor is None else polynomial @ factor
        if step + 1 < steps:
            gram = polynomial @ gram @ polynomial
    return x if factor is None else factor.to(x.dtype) @ x


def _as_matrices(tensor: Tensor) -> Tensor:
    """Matrices as they are, in batches if 3-D; convolutions [out, in, ...] as [out, in * ...]."""
    return tensor.flatten(1) if tensor.dim() > 3 else tensor


class Muon(FlatOptimizer):
    """Muon for groups with `use_muon=True` (the default), AdamW for groups with `use_muon=False`.

    Group keys with Muon: lr 0.02, momentum 0.95, nesterov, weight_decay, ns_steps, ns_method; else lr 3e-4,
    betas (0.9, 0.95), eps 1e-10, weight_decay. A group's own values win over the arguments here.
    State: `step`, and `momentum_buffer` or `exp_avg`, `exp_avg_sq`.

    Args:
        ns_dtype: see `newton_schulz`.
    Further keywords: `FlatOptimizer`.
    """

    carried: ClassVar[tuple[str, ...]] = (*FlatOptimizer.carried, "ns_dtype", "_muon_keys", "_adam_keys")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        weight_decay: float | None = None,
        momentum: float = 0.95,
        ns_method: str = "gram",
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        ns_dtype: torch.dtype | None = None,
        **storage: Any,
    ) -> None:
        given = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "ns_method": ns_method}
        own = {"lr": lr, "weight_decay": weight_decay}
        self._muon_keys = MUON_KEYS | given | {key: value for key, value in own.items() if value is not None}
        own = {"lr": lr if adam_lr is None else adam_lr, "weight_decay": weight_decay}
        adam = {"betas": betas, "eps": eps}
        self._adam_keys = ADAM_KEYS | adam | {key: value for key, value in own.items() if value is not None}
        self.ns_dtype = ns_dtype
        super().__init__(params, {"use_muon": True}, **storage)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults of the rule that it is stepped by."""
        muon = param_group.get("use_muon", True)
        group = (self._muon_keys if muon else self._adam_keys) | param_group
        check_rate("Muon", lr=group["lr"], weight_decay=group["weight_decay"])
        if muon:
            method, steps = group["ns_method"], group["ns_steps"]
            require(method in METHODS, f"Muon: ns_method is {method!r}; supported are {', '.join(METHODS)}")
            require(steps >= 1, f"Muon: ns_steps is {steps}; expected at least 1")
            check_betas("Muon", (group["momentum"], 0.0))
        else:
            check_betas("Muon", group["betas"])
        super().add_param_group(group)
        for parameter in self.param_groups[-1]["params"] if muon else ():
            require(  # one without elements is a placeholder, whose shape its owner knows
                parameter.dim() >= 2 or not parameter.numel(),
                f"Muon: a parameter of shape {tuple(parameter.shape)} is no matrix; put it into a group with"
                " use_muon=False",
            )

    def state_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step_pieces(self, batches: Iterable[Batch]) -> None:
        """Momentum by pieces, Newton-Schulz by whole matrices, the update by pieces."""
        for batch in batches:
            directions: dict[int, Tensor] = {}
            for piece in batch.pieces:
                group = batch.slots[piece.slot].group
                if group["use_muon"]:
                    directions[piece.slot] = self._momentum(batch, piece)
                else:
                    update_adam(group, piece, batch.grad_scale, self.seed_of(batch, piece))
            matrices = [index for index, slot in enumerate(batch.slots) if slot.group["use_muon"]]
            if not matrices:
                continue

            def orthogonal(slot: int, whole: Tensor, batch: Batch = batch) -> Tensor:
                group, matrix = batch.slots[slot].group, _as_matrices(whole)
                scale = max(1.0, matrix.size(-2) / matrix.size(-1)) ** 0.5
                return newton_schulz(matrix, group["ns_steps"], group["ns_method"], self.ns_dtype).mul_(scale)

            updates = batch.map_whole(matrices, directions, orthogonal)
            for piece in batch.pieces:
                if piece.slot in updates:
                    self._apply(batch, piece, updates[piece.slot])

    def _momentum(self, batch: Batch, piece: Piece) -> Tensor:
        """Update the momentum; returns what is to be orthogonalised, fp32 (fp64).

        Each operation is rounded by itself, so that how a matrix is cut does not show.
        """
        group, buffer = batch.slots[piece.slot].group, piece.state["momentum_buffer"]
        beta = group["momentum"]
        wide = torch.promote_types(buffer.dtype, torch.float32)
        new = piece.grad.to(wide, copy=True).mul_(batch.grad_scale).mul_(1 - beta)
        momentum = (buffer.to(wide) * beta).add_(new)
        seed = self.seed_of(batch, piece)
        round_to(buffer, momentum, None if seed is None else (seed + 1) & 0xFFFFFFFF)
        return new.add_(momentum.mul_(beta)) if group["nesterov"] else momentum

    def _apply(self, batch: Batch, piece: Piece, update: Tensor) -> None:
        group = batch.slots[piece.slot].group
        lr = float(group["lr"])
        value = piece.param.to(update.dtype, copy=True).mul_(1 - lr * group["weight_decay"]).sub_(update.mul(lr))
        round_to(piece.param, value, self.seed_of(batch, piece))
        if piece.out is not None:
            piece.out.copy_(value)
