"""decode: one new token of each sequence through a whole decoder; bind_decode: the same prepared for a loop.

On CPU with numba all of it is one launch: the threads walk through the layers together and meet at a barrier after
every stage, instead of being sent off some hundred times per token (`cpu_numba`). Elsewhere it is a composition of this
package's operations (`composed`).

Limit for few rows: memory. A token reads every weight once (a tied embedding once, as the head), and its context's keys
and values; 16-bit weights of up to eight rows hide their arithmetic behind that on CPUs with vectors of 512 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ds_kernels._checks import FLOATS, require
from ds_kernels._dispatch import backend_for
from ds_kernels.ops.decode import composed, cpu, reference
from ds_kernels.ops.decode.model import DecodeModel, Norm, Projection

__all__ = ["DecodeProgram", "bind_decode", "decode"]

MAX_ROWS = 64
KINDS = ("silu", "gelu", "gelu_tanh", "relu")


class DecodeProgram(Protocol):
    """What `bind_decode` returns.

    Attributes:
        rows: tokens that a call may have.
    """

    rows: int

    def __call__(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, context_lens: Tensor
    ) -> Tensor:
        """As `decode`; the logits are a buffer that the next call writes over."""


def decode(
    model: DecodeModel, tokens: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, context_lens: Tensor,
    k_caches: Sequence[Tensor], v_caches: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """One new token for each of B sequences through a whole decoder; its keys and values are written to the caches.

    Args:
        model: weights and what is computed with them.
        tokens: [B], integers.
        positions: [B], integers: of the tokens in their sequences, for learned and rotary positions.
        slots: [B], integers: block * block_size + offset, the place of the sequence's last key, where the token's own
            key and value go; -1: nothing is written.
        block_tables: [B, blocks of the longest], int32: the blocks of each context in order.
        context_lens: [B], int32: keys of each sequence, the new one included; 0: padding, which attends to nothing.
        k_caches: per layer [blocks, kv_heads, block_size, head_dim], a float dtype, the last dimension contiguous; a
            static cache is the same with one block per sequence.
        v_caches: as k_caches.

    Returns:
        [B, vocabulary] fp32. With the reference and on CPU with numba everything between weights and caches is fp32
        (activations that meet quantised weights are held to 2^-16 of the largest in their group), and a row's result
        does not depend on the rows beside it; elsewhere it is rounded to the model's dtype between operations.

    Raises:
        KernelArgumentError: shapes that do not fit; on the CPU an index that is out of range.
    """
    _check(model, k_caches, v_caches)
    with torch.no_grad():
        backend = backend_for(tokens)
        if backend == "reference":
            return reference.decode(model, tokens, positions, slots, block_tables, context_lens, k_caches, v_caches)
        if backend == "cpu" and 0 < len(tokens) <= MAX_ROWS and cpu.why_not(model, k_caches, v_caches) is None:
            program = cpu.Program(model, k_caches, v_caches, len(tokens), None)
            return program(tokens, positions, slots, block_tables, context_lens)
        return composed.decode(model, tokens, positions, slots, block_tables, context_lens, k_caches, v_caches)


def bind_decode(
    model: DecodeModel, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], max_rows: int = 8, *,
    activation_bits: int | None = None,
) -> DecodeProgram:  # fmt: skip
    """`decode` prepared for a loop over fixed weights and caches, on CPU, as one launch per call.

    The weights are read where they are at every call: writing to them in place is seen, replacing them is not.

    Args:
        model, k_caches, v_caches: as for `decode`; kept alive.
        max_rows: the most tokens of a call, up to 64; up to 8 pass over the weights once.
        activation_bits: 8 quantises activations that meet quantised weights to 8 bits per row and group; None to 16.

    Returns:
        The program; not for two threads at a time.

    Raises:
        KernelArgumentError: what cannot run this way, and why; `decode` takes it.
    """
    require(0 < max_rows <= MAX_ROWS, f"bind_decode: max_rows is {max_rows}; expected 1 to {MAX_ROWS}")
    require(
        activation_bits in (None, 8), f"bind_decode: activation_bits is {activation_bits}; supported are 8 and None"
    )
    _check(model, k_caches, v_caches)
    return cpu.Program(model, k_caches, v_caches, max_rows, activation_bits)


def _check(model: DecodeModel, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]) -> None:
    """What a model says of itself fits together."""
    count = len(model.layers)
    require(count > 0, "decode: the model has no layers")
    require(
        len(k_caches) == len(v_caches) == count,
        f"decode: {len(k_caches)} and {len(v_caches)} caches; expected one of each for the {count} layers",
    )
    require(
        model.kv_heads > 0 and model.heads % model.kv_heads == 0,
        f"decode: {model.heads} heads and {model.kv_heads} of the caches; expected a multiple of them",
    )
    require(model.activation in KINDS, f"decode: activation is {model.activation!r}; expected one of {KINDS}")
    for cache in (*k_caches, *v_caches):
        require(
            cache.dim() == 4 and cache.shape[1] == model.kv_heads and cache.shape[3] == model.head_dim,
            f"decode: a cache has shape {tuple(cache.shape)}; expected [blocks, {model.kv_heads}, block size, "
            f"{model.head_dim}]",
        )
        require(cache.dtype in FLOATS, f"decode: a cache is of {cache.dtype}; expected a float dtype")
    vocabulary, hidden = model.embedding.shape
    inner = model.layers[0].down.weight.shape[1]
    width = model.heads * model.head_dim
    _fits("head", model.head, vocabulary, hidden)
    _is_long("final_norm", model.final_norm, hidden)
    for number, layer in enumerate(model.layers):
        what = f"layer {number}: "
        _fits(what + "qkv", layer.qkv, width + 2 * model.kv_heads * model.head_dim, hidden)
        _fits(what + "output", layer.output, hidden, width)
        _fits(what + "up", layer.up, inner * (2 if model.gated else 1), hidden)
        _fits(what + "down", layer.down, hidden, inner)
        for name in ("attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm"):
            _is_long(what + name, getattr(layer, name), hidden)
        for name in ("query_norm", "key_norm"):
            _is_long(what + name, getattr(layer, name), model.head_dim)
        require(
            layer.rope is None
            or (layer.rope.cos.shape == layer.rope.sin.shape and 2 * layer.rope.cos.shape[1] <= model.head_dim
                and layer.rope.cos.dtype == layer.rope.sin.dtype == torch.float32),
            f"{what}rope: tables must be fp32 [positions, up to {model.head_dim // 2}], alike",
        )  # fmt: skip
        require(layer.window is None or layer.window > 0, f"{what}window is {layer.window}; expected at least 1")


def _fits(what: str, p: Projection, outputs: int, columns: int) -> None:
    require(
        tuple(p.weight.shape) == (outputs, columns) and (p.bias is None or tuple(p.bias.shape) == (outputs,)),
        f"decode: {what} has a weight of shape {tuple(p.weight.shape)}"
        + ("" if p.bias is None else f" and a bias of shape {tuple(p.bias.shape)}")
        + f"; expected [{outputs}, {columns}]",
    )


def _is_long(what: str, norm: Norm | None, features: int) -> None:
    require(
        norm is None or tuple(norm.weight.shape) == (features,),
        f"decode: {what} does not have {features} features",
    )
