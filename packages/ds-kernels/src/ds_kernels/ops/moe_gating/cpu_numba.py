"""The loops of moe_gate.

The largest logits are found as largest 64-bit keys: above the logit's bits in an order that integers share with
floats, below the expert counted from the end, so that of equal logits the first expert wins and a maximum is one
vector instruction. A chosen key is struck out for the next choice.
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import numpy as np

from ds_kernels._cpu.intrinsics import (
    as_bits,
    f32_array,
    float_at,
    grain,
    i32_array,
    i64_array,
    load,
    store,
    take,
    total,
)
from ds_kernels._cpu.launch import kernel
from ds_kernels._cpu.maths import exp

__all__ = ["gate", "gate_backward", "sort"]

_STRUCK = np.int64(-(1 << 63))


@kernel
def gate(a):
    """Slots: logits, weights, experts, lse, partial, tokens, num_experts, top_k, renormalize, code.

    Items are groups of tokens, with partial sums of the probabilities and of lse^2.
    """
    tokens, n, top_k, renormalize, code, groups = a[8], a[9], a[10], a[11], a[12], total(a)
    weights, experts = f32_array(a, 4, tokens * top_k), i64_array(a, 5, tokens * top_k)
    lse, partial = f32_array(a, 6, tokens), f32_array(a, 7, groups * (n + 1))
    row, probs, keys = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int64)
    group = take(a)
    while group < groups:
        own = partial[group * (n + 1) : (group + 1) * (n + 1)]
        for e in range(n + 1):
            own[e] = np.float32(0.0)
        for t in range(tokens * group // groups, tokens * (group + 1) // groups):
            load(a, 3, code, t * n, n, row)
            for e in range(n):
                bits = np.int64(np.int32(as_bits(row[e])))
                keys[e] = ((bits ^ ((bits >> 63) & np.int64(0x7FFFFFFF))) << 32) | (n - 1 - e)
            chosen, norm = np.float32(0.0), np.float32(0.0)
            top = np.float32(0.0)
            for j in range(top_k):
                best = _STRUCK
                for e in range(n):
                    best = max(best, keys[e])
                expert = n - 1 - (best & np.int64(0xFFFFFFFF))
                keys[expert] = _STRUCK
                if j == 0:
                    top = row[expert]
                weight = exp(row[expert] - top)
                weights[t * top_k + j] = weight
                experts[t * top_k + j] = expert
                chosen += weight
            for e in range(n):
                probs[e] = exp(row[e] - top)
            for e in range(n):
                norm += probs[e]
            inverse = np.float32(1.0) / norm
            for e in range(n):
                own[e] += probs[e] * inverse
            log = np.float32(top + np.log(norm))
            lse[t] = log
            own[n] += log * log
            scale = np.float32(1.0) / chosen if renormalize else inverse
            for j in range(t * top_k, (t + 1) * top_k):
                weights[j] *= scale
        group = take(a)


@kernel
def gate_backward(a):
    """Slots: grad_weights, grad_mean, logits, weights, experts, lse, grad, tokens, num_experts, top_k, renormalize,
    code, grad_z. Items are tokens; grad_mean and grad_z are divided by their number."""
    tokens, n, top_k, renormalize, code = a[10], a[11], a[12], a[13], a[14]
    grad_z = np.float32(float_at(a, 15))
    grad_weights, weights = f32_array(a, 3, tokens * top_k), f32_array(a, 6, tokens * top_k)
    grad_mean, experts, lse = f32_array(a, 4, n), i64_array(a, 7, tokens * top_k), f32_array(a, 8, tokens)
    row = np.empty(n, np.float32)
    low = take(a)
    while low < total(a):
        for t in range(low, min(low + grain(a), total(a))):
            load(a, 5, code, t * n, n, row)
            log, inner, pull = lse[t], np.float32(0.0), np.float32(0.0)
            for j in range(t * top_k, (t + 1) * top_k):
                inner += weights[j] * grad_weights[j]
            for e in range(n):
                row[e] = exp(row[e] - log)
            for e in range(n):
                pull += row[e] * grad_mean[e]
            shift = np.float32(2.0) * grad_z * log - pull
            if not renormalize:
                shift -= inner
            for e in range(n):
                row[e] = row[e] * (grad_mean[e] + shift)
            for j in range(t * top_k, (t + 1) * top_k):
                row[experts[j]] += weights[j] * (grad_weights[j] - (inner if renormalize else np.float32(0.0)))
            store(a, 9, code, t * n, n, row)
        low = take(a)


@kernel
def sort(a):
    """Slots: experts, slots, sources, ends (int32), counts, tokens, top_k, num_experts, capacity, padded, rows.

    One item: a counting sort, all first choices before all second ones.
    """
    tokens, top_k, n, capacity, padded, rows = a[8], a[9], a[10], a[11], a[12], a[13]
    experts, slots, sources = i64_array(a, 3, tokens * top_k), i64_array(a, 4, tokens * top_k), i64_array(a, 5, rows)
    ends, counts = i32_array(a, 6, n), i64_array(a, 7, n)
    if take(a) > 0:
        return
    for e in range(n):
        counts[e] = 0
    for c in range(tokens * top_k):
        counts[experts[c]] += 1
    free, last = np.empty(n, np.int64), np.empty(n, np.int64)
    row = np.int64(0)
    for e in range(n):
        kept = min(counts[e], capacity) if capacity else counts[e]
        free[e] = e * capacity if padded else row
        last[e] = free[e] + kept
        row += kept
        ends[e] = np.int32(row)
    for r in range(rows):
        sources[r] = -1
    for j in range(top_k):
        for t in range(tokens):
            choice = t * top_k + j
            e = experts[choice]
            if free[e] < last[e]:
                slots[choice], sources[free[e]] = free[e], choice
                free[e] += 1
            else:
                slots[choice] = -1
