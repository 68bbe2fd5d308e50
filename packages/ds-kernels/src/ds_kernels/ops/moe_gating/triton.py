"""moe_gate in Triton: one program for a block of tokens with all their experts in registers."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2, type_name
from ds_kernels.ops.moe_gating import reference

__all__ = ["builds", "gate", "gate_backward"]

MAX_EXPERTS = 1024
TILE = 2048
"""Logits of one program: tokens * experts rounded up to a power of two."""
STRUCK = tl.constexpr(-(1 << 63))
"""The key of an expert that cannot be chosen (any more)."""


@triton.jit
def _gate(
    logits, weights, experts, lse, partial, tokens, num_experts, top_k,
    RENORMALIZE: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    inside, real = token < tokens, expert < num_experts
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    row = tl.load(logits + at, inside[:, None] & real[None, :], other=0.0).to(tl.float32)
    row = tl.where(real[None, :], row, float("-inf"))
    top = tl.max(row, 1)
    probs = tl.where(real[None, :], tl.exp(row - top[:, None]), 0.0)
    norm = tl.sum(probs, 1)
    log = top + tl.log(norm)
    tl.store(lse + token, log, inside)
    share = tl.where(inside[:, None], probs / norm[:, None], 0.0)
    own = partial + tl.program_id(0).to(tl.int64) * (num_experts + 1)
    tl.store(own + expert, tl.sum(share, 0), real)
    tl.store(own + num_experts, tl.sum(tl.where(inside, log * log, 0.0), 0))
    # As 64-bit keys: of equal logits the first expert is the largest; a chosen key is struck out.
    bits = row.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    keys = tl.where(real[None, :], (ordered << 32) | (EXPERTS - 1 - expert)[None, :].to(tl.int64), STRUCK)
    chosen = tl.zeros((TOKENS,), tl.float32)
    for j in range(top_k):
        best = tl.max(keys, 1)
        index = EXPERTS - 1 - (best & 0xFFFFFFFF)
        mine = expert[None, :] == index[:, None]
        keys = tl.where(mine, STRUCK, keys)
        weight = tl.sum(tl.where(mine, probs, 0.0), 1)
        chosen += weight
        tl.store(experts + token.to(tl.int64) * top_k + j, index, inside)
        if not RENORMALIZE:
            tl.store(weights + token.to(tl.int64) * top_k + j, weight / norm, inside)
    if RENORMALIZE:
        keys = tl.where(real[None, :], (ordered << 32) | (EXPERTS - 1 - expert)[None, :].to(tl.int64), STRUCK)
        for j in range(top_k):
            best = tl.max(keys, 1)
            mine = expert[None, :] == (EXPERTS - 1 - (best & 0xFFFFFFFF))[:, None]
            keys = tl.where(mine, STRUCK, keys)
            weight = tl.sum(tl.where(mine, probs, 0.0), 1)
            tl.store(weights + token.to(tl.int64) * top_k + j, weight / chosen, inside)


@triton.jit
def _gate_backward(
    grad_weights, grad_mean, grad_z, logits, weights, experts, lse, grad, tokens, num_experts, top_k,
    RENORMALIZE: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    inside, real = token < tokens, expert < num_experts
    both = inside[:, None] & real[None, :]
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    log = tl.load(lse + token, inside, other=0.0)
    row = tl.load(logits + at, both, other=0.0).to(tl.float32)
    probs = tl.where(both, tl.exp(row - log[:, None]), 0.0)
    mean = tl.load(grad_mean + expert, real, other=0.0)
    choices = token.to(tl.int64) * top_k
    inner = tl.zeros((TOKENS,), tl.float32)
    for j in range(top_k):
        weight = tl.load(weights + choices + j, inside, other=0.0)
        inner += weight * tl.load(grad_weights + choices + j, inside, other=0.0)
    shift = 2.0 * tl.load(grad_z) * log - tl.sum(probs * mean[None, :], 1)
    if not RENORMALIZE:
        shift -= inner
    out = probs * (mean[None, :] + shift[:, None])
    for j in range(top_k):
        weight = tl.load(weights + choices + j, inside, other=0.0)
        pull = tl.load(grad_weights + choices + j, inside, other=0.0)
        if RENORMALIZE:
            pull -= inner
        index = tl.load(experts + choices + j, inside, other=0)
        out += tl.where(expert[None, :] == index[:, None], (weight * pull)[:, None], 0.0)
    tl.store(grad + at, out.to(grad.dtype.element_ty), both)


def _takes(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and 0 < logits.shape[1] <= MAX_EXPERTS and logits.numel() > 0


def _blocks(num_experts: int) -> tuple[int, int]:
    """(tokens, experts) of one program."""
    experts = next_power_of_2(num_experts)
    return max(1, TILE // experts), experts


def gate(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference, which takes fp64 and more experts than a program holds."""
    if not _takes(logits):
        return reference.gate(logits, top_k, renormalize)
    tokens, num_experts = logits.shape
    block, padded = _blocks(num_experts)
    programs = triton.cdiv(tokens, block)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    lse, partial = weights.new_empty(tokens), weights.new_empty(programs, num_experts + 1)
    _gate[(programs,)](logits, weights, experts, lse, partial, tokens, num_experts, top_k, renormalize, block, padded)
    sums = partial.sum(0) / tokens
    return weights, experts, sums[:num_experts].clone(), sums[num_experts].clone(), lse


def gate_backward(
    grad_weights: Tensor, grad_mean: Tensor, grad_z: Tensor, logits: Tensor, weights: Tensor, experts: Tensor,
    lse: Tensor, renormalize: bool,
) -> Tensor:  # fmt: skip
    """As the reference, which takes fp64 and more experts than a program holds."""
    if not _takes(logits):
        return reference.gate_backward(grad_weights, grad_mean, grad_z, logits, weights, experts, lse, renormalize)
    tokens, num_experts = logits.shape
    block, padded = _blocks(num_experts)
    grad = torch.empty_like(logits)
    _gate_backward[(triton.cdiv(tokens, block),)](
        grad_weights, grad_mean / tokens, grad_z / tokens, logits, weights, experts, lse, grad,
        tokens, num_experts, weights.shape[1], renormalize, block, padded,
    )  # fmt: skip
    return grad


def builds() -> Iterator[Build]:
    """Few and the most experts that are launched."""
    numbers = dict.fromkeys(("tokens", "num_experts", "top_k"), "i32")
    for dtype, num_experts, renormalize in ((torch.float32, 64, True), (torch.bfloat16, MAX_EXPERTS, False)):
        name = f"*{type_name(dtype)}"
        block, padded = _blocks(num_experts)
        constants = {"RENORMALIZE": renormalize, "TOKENS": block, "EXPERTS": padded}
        shared = {"logits": name, "weights": "*fp32", "experts": "*i64", "lse": "*fp32", **numbers}
        yield Build(_gate, {**shared, "partial": "*fp32"}, constants, num_stages=3)
        grads = {"grad_weights": "*fp32", "grad_mean": "*fp32", "grad_z": "*fp32", "grad": name}
        yield Build(_gate_backward, {**shared, **grads}, constants, num_stages=3)
