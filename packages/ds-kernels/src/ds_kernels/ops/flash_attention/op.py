"""flash_attention: softmax(scale * q k^T) v without the matrix of scores in memory.

Source: Dao et al. 2022, "FlashAttention" (arXiv:2205.14135); Dao 2023, "FlashAttention-2" (arXiv:2307.08691); sliding
windows as in Mistral (arXiv:2310.06825); grouped queries, Ainslie et al. 2023 (arXiv:2305.13245).
Limit: arithmetic. Forward 4 * heads * dim flops per visible pair of query and key, backward 10 (five products, the
scores once again); memory is touched once per tensor: `itemsize * dim * (2 * heads * q_len + 2 * kv_heads * k_len)`
bytes forward.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, require
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.ops.flash_attention import cpu, reference

__all__ = ["check_heads", "flash_attention"]

MAX_TRITON_DIM = 256


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention, dense (as torch's SDPA lays tensors out) or over packed sequences.

    Args:
        q: [batch, heads, q_len, dim]; packed, with cu_seqlens_q: [tokens, heads, dim]. fp32, bf16, fp16 or fp64;
            any strides (best: the last dimension contiguous).
        k: [batch, kv_heads, k_len, dim]; packed: [k_tokens, kv_heads, dim]. heads is a multiple of kv_heads: query
            head h reads key head h // (heads // kv_heads).
        v: as k.
        causal: a query sees no key after its own position. The last query stands at the last key, so q_len < k_len
            means a context in front (torch's `is_causal` differs there: it aligns the first ones).
        scale: of the scores; 1 / sqrt(dim) by default.
        window: a query sees this many keys, itself counted (Hugging Face's `sliding_window`; flash-attn's
            `window_size=(window - 1, 0)`); not causal: as many in both directions.
        cu_seqlens_q: [sequences + 1] int32 or int64, ascending from 0 to tokens: where the sequences start.
        cu_seqlens_k: the same for the keys; cu_seqlens_q by default.
        max_seqlen_q: the longest sequence's queries; saves a GPU a synchronisation, otherwise never needed.
        max_seqlen_k: the same for the keys.
        return_lse: also return the log-sum-exp of the scores, fp32 [batch, heads, q_len] or [heads, tokens]; it
            carries no gradient.

    Returns:
        Tensor like q; dense ones lie in memory as [batch, q_len, heads, dim]. Scores and sums are in fp32, the weights
        are rounded to the inputs' dtype in front of the product with v. A query that sees no key gets zeros.

    Raises:
        KernelArgumentError: shapes, dtypes or devices that do not fit, a window below 1; on a GPU, dim above 256.
    """
    name = "flash_attention"
    packed = cu_seqlens_q is not None
    require(packed or cu_seqlens_k is None, f"{name}: cu_seqlens_k is given without cu_seqlens_q; give both or none")
    check_heads(name, q, k, v, 3 if packed else 4)
    require(window is None or window >= 1, f"{name}: window is {window}; expected at least 1, or None for no limit")
    require(q.device.type == "cpu" or q.shape[-1] <= MAX_TRITON_DIM,
            f"{name}: head dimension {q.shape[-1]} on {q.device}; supported are up to {MAX_TRITON_DIM}")  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not packed:
        require(q.shape[0] == k.shape[0], f"{name}: batch of q is {q.shape[0]}, of k {k.shape[0]}; they must be equal")
        out, lse = _FORWARD(q, k, v, None, None, q.shape[2], k.shape[2], causal, window or 0, scale)
        return (out, lse) if return_lse else out
    assert cu_seqlens_q is not None
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    for which, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_dtype(name, which, starts, (torch.int32, torch.int64))
        require(
            starts.dim() == 1 and len(starts) == len(cu_seqlens_q) > 0,
            f"{name}: {which} has shape {tuple(starts.shape)}; expected one dimension of sequences + 1",
        )
    check_device(name, q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    dense = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    longest = (max_seqlen_q or q.shape[0], max_seqlen_k or k.shape[0])
    out, lse = _FORWARD(*dense, cu_seqlens_q, cu_seqlens_k, *longest, causal, window or 0, scale)
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def check_heads(name: str, q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    """q, k and v have `dims` dimensions, one dtype, device and head dimension, and heads in proportion."""
    layout = "[tokens, heads, dim]" if dims == 3 else "[batch, heads, len, dim]"
    for which, x in (("q", q), ("k", k), ("v", v)):
        require(x.dim() == dims, f"{name}: {which} has shape {tuple(x.shape)}; expected {layout}")
        check_dtype(name, which, x)
        require(x.dtype == q.dtype, f"{name}: {which} is of dtype {x.dtype}, q of {q.dtype}; they must be equal")
    check_device(name, q, k=k, v=v)
    require(k.shape == v.shape, f"{name}: k has shape {tuple(k.shape)}, v {tuple(v.shape)}; they must be equal")
    require(k.shape[-1] == q.shape[-1] > 0,
            f"{name}: head dimension of q is {q.shape[-1]}, of k {k.shape[-1]}; they must be equal")  # fmt: skip
    heads, kv_heads = q.shape[dims - 2 if dims == 3 else 1], k.shape[dims - 2 if dims == 3 else 1]
    require(kv_heads > 0 and heads % kv_heads == 0,
            f"{name}: q has {heads} heads, k {kv_heads}; expected a multiple of them")  # fmt: skip


def _check_starts(which: str, starts: Tensor, tokens: int) -> None:
    ends = starts.tolist()
    require(
        ends[0] == 0 and ends[-1] == tokens and all(a <= b for a, b in pairwise(ends)),
        f"flash_attention: {which} is {ends}; expected an ascent from 0 to the number of tokens, {tokens}",
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
    causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.device.type == "cpu" and cu_q is not None and cu_k is not None:  # here, where torch.compile has tensors too
        _check_starts("cu_seqlens_q", cu_q, q.shape[2])
        _check_starts("cu_seqlens_k", cu_k, k.shape[2])
    backend = backend_for(q)
    if backend == "reference":
        return reference.flash_attention(q, k, v, cu_q, cu_k, causal, window, scale)
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    if backend == "triton":
        from ds_kernels.ops.flash_attention import triton

        return triton.flash_attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, window, scale)
    return cpu.flash_attention(q, k, v, cu_q, cu_k, causal, window, scale)


def _forward_fake(q: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    return reference.empty_output(q)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    backend = backend_for(q)
    if backend == "reference":
        return reference.flash_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal, window, scale)
    grad, q, k, v = _unit_stride(grad), _unit_stride(q), _unit_stride(k), _unit_stride(v)
    if backend == "triton":
        from ds_kernels.ops.flash_attention import triton

        return triton.flash_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, window, scale)
    return cpu.flash_attention_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal, window, scale)


def _backward_fake(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, ...]:
    return tuple(reference.empty_output(x)[0] for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _BACKWARD(grad, *ctx.saved_tensors, *ctx.options)
    return (*gradients, *(None,) * 7)


_OPTIONS = "Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, bool causal, SymInt window, float scale"
_BACKWARD = Op(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_FORWARD = Op(
    f"flash_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_save,
    backward=_gradients,
)
