"""A decoder bound for the numba program: its tables of words, its buffers, its call."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ds_kernels._checks import require
from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, run_team, slots_of, word_of
from ds_kernels.errors import KernelArgumentError
from ds_kernels.ops.decode import layout as at
from ds_kernels.ops.decode.model import DecodeLayer, DecodeModel, Norm, Projection
from ds_kernels.ops.decode.reference import scale_of
from ds_kernels.ops.linear.weight import QuantizedWeight

__all__ = ["Program", "why_not"]

GRAIN_NBYTES = 1 << 14
"""Bytes of weights of an item, about."""
SYNC_NBYTES = 64
ERRORS = {
    1: "tokens has one outside the vocabulary",
    2: "positions has one below 0 or beyond the tables of positions",
    3: "slots has one outside the caches",
    4: "context_lens has one below 0 or beyond its block table",
    5: "block_tables names a block outside the caches",
}


class Program:
    """A decoder over fixed weights and caches; called with up to max_rows tokens. Not reentrant."""

    def __init__(
        self, model: DecodeModel, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], max_rows: int,
        activation_bits: int | None,
    ) -> None:  # fmt: skip
        reason = why_not(model, k_caches, v_caches)
        require(reason is None, f"bind_decode: {reason}")
        self.model, self.rows = model, max_rows
        self._alive = (tuple(k_caches), tuple(v_caches))
        self._planes = 1 if activation_bits == 8 else 2
        layers = [_layer(*each) for each in zip(model.layers, k_caches, v_caches, strict=True)]
        words = [word for layer in layers for word in layer]
        head = len(words)
        words += [*_projection(model.head), *_norm(model.final_norm)]
        self._table = torch.tensor(words, dtype=torch.int64)
        own = [first + record for first in range(0, head, at.LAYER) for record in (at.QKV, at.OUTPUT, at.UP, at.DOWN)]
        self._places = [*own, head]
        hidden, heads, dim = model.final_norm.weight.shape[0], model.heads, model.head_dim
        self._logits = torch.empty(max_rows, model.head.weight.shape[0])
        fused, inner = (heads + 2 * model.kv_heads) * dim, model.layers[0].up.weight.shape[0]
        self._shared = {
            name: torch.empty(max_rows * width)
            for name, width in (
                (at.QKV_OUT, fused), (at.PARTIALS, heads * at.MAX_SPLITS * (dim + 2)), (at.MIXED, hidden),
                (at.UP_OUT, inner),
            )
        }  # fmt: skip
        self._room = _Room(model, max_rows, self._planes, _span(k_caches[0]))
        self._slots, self._threads, self._block = slots_of(at.SLOTS_END), 0, 0
        first = self._table.data_ptr()
        facts = _facts(model, k_caches[0]) | self._shared | self._room.slots
        facts |= {
            at.LAYERS: first, at.HEAD_AT: first + 8 * head, at.FINAL_NORM: first + 8 * (head + at.PROJECTION),
            at.LOGITS: self._logits, at.PLANES: self._planes, at.SELF: ctypes.addressof(self._slots),
        }  # fmt: skip
        for slot, fact in facts.items():
            self._slots[slot] = word_of(fact)

    def __call__(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, context_lens: Tensor
    ) -> Tensor:
        """Logits fp32 [B, vocabulary] of one new token for each of B sequences: a buffer that the next call reuses.

        Raises:
            KernelArgumentError: more rows than it was bound for, or an index that is out of range: nothing is written.
        """
        rows = tokens.shape[0]
        if not 0 < rows <= self.rows:
            raise KernelArgumentError(f"decode: {rows} rows; this program was bound for 1 to {self.rows}")
        require(
            positions.shape == slots.shape == context_lens.shape == tokens.shape == block_tables.shape[:1],
            f"decode: shapes are {tuple(positions.shape)}, {tuple(slots.shape)}, {tuple(block_tables.shape)}, "
            f"{tuple(context_lens.shape)}; expected {rows} rows in each, as in tokens",
        )
        longs = [part.to(torch.int64).contiguous() for part in (tokens, positions, slots)]
        ints = [part.to(torch.int32).contiguous() for part in (block_tables, context_lens)]
        if self._threads < torch.get_num_threads():
            self._make_room()
        if self._block != block_of(rows):
            self._choose(block_of(rows))
        words = self._slots
        self._sync.zero_()
        words[at.TOKENS], words[at.POSITIONS], words[at.SLOTS] = (part.data_ptr() for part in longs)
        words[at.TABLES], words[at.LENGTHS] = (part.data_ptr() for part in ints)
        words[at.ROWS], words[at.PAGES_WIDTH], words[at.ERROR] = rows, block_tables.shape[1], 0
        run_team(self._kernel, words)
        if words[at.ERROR]:
            raise KernelArgumentError(f"decode: {ERRORS[words[at.ERROR]]}")
        return self._logits[:rows]

    def _make_room(self) -> None:
        """Scratch and counters for as many threads as torch has now."""
        from ds_kernels._cpu.team import LINE, SETS, addresses

        self._threads = torch.get_num_threads()
        self._own = torch.zeros(self._room.nbytes * self._threads + 64, dtype=torch.uint8)
        self._sync = torch.zeros((LINE * (2 + SETS * self._threads)) // 8, dtype=torch.int64)
        words = self._slots
        words[at.OWN], words[at.SYNC] = _aligned(self._own.data_ptr()), _aligned(self._sync.data_ptr())
        words[at.TEAM_SIZE_AT], words[at.TEAM_INDEX_AT], words[at.YIELD_AT] = addresses()

    def _choose(self, block: int) -> None:
        """The machine code of products with blocks of this many rows, compiled when it is first needed."""
        from ds_kernels.ops.decode.attention_numba import ATTEND
        from ds_kernels.ops.decode.cpu_numba import DECODE
        from ds_kernels.ops.decode.products import DENSE, PACK, QUANTISED

        projections = [p for layer in self.model.layers for p in (layer.qkv, layer.output, layer.up, layer.down)]
        for weight, place in zip((p.weight for p in (*projections, self.model.head)), self._places, strict=True):
            if isinstance(weight, Tensor):
                kind = CODES[weight.dtype]
                product = DENSE[kind, block]
            else:
                kind = weight.bits
                product = QUANTISED[kind, self._planes, 0 if weight.centre is None else 1, block]
            self._table[place + at.PACK], self._table[place + at.PRODUCT] = PACK[kind].address, product.address
        self._slots[at.ATTEND] = ATTEND[self._slots[at.CACHE_CODE]].address
        self._kernel, self._block = DECODE, block


def block_of(rows: int) -> int:
    """Activation rows of a pass over the weights."""
    return 1 if rows <= 1 else 2 if rows <= 2 else 4 if rows <= 4 else 8


def _span(cache: Tensor) -> int:
    """Keys of a split of the longest context that the caches hold."""
    return at.SPAN * -(-cache.shape[0] * cache.shape[2] // (at.SPAN * at.MAX_SPLITS))


def _facts(model: DecodeModel, cache: Tensor) -> dict[int, Tensor | int | float]:
    """Slots that say what the model is."""
    table, learned = _projection(Projection(model.embedding)), model.positions
    scale = model.attention_scale
    facts: dict[int, Tensor | int | float] = {
        at.NUM_LAYERS: len(model.layers), at.HIDDEN: table[at.COLUMNS], at.HEADS: model.heads,
        at.KV_HEADS: model.kv_heads, at.DIM: model.head_dim, at.INTERMEDIATE: model.layers[0].down.weight.shape[1],
        at.ACTIVATION: at.ACTIVATIONS[model.activation], at.GATED: int(model.gated),
        at.SCALE_OF_SCORES: float(model.head_dim**-0.5 if scale is None else scale),
        at.ATTENTION_SOFTCAP: float(model.attention_softcap or 0.0),
        at.LOGIT_SOFTCAP: float(model.logit_softcap or 0.0), at.CACHE_CODE: CODES[cache.dtype],
        at.PAGE_SIZE: cache.shape[2], at.PAGES: cache.shape[0], at.MAX_POSITION: _max_position(model),
        at.SPAN_MAX: _span(cache), at.EMBEDDING: table[at.WEIGHT], at.EMBEDDING_KIND: table[at.KIND],
        at.EMBEDDING_SCALE_AT: table[at.SCALE], at.EMBEDDING_CENTRE: table[at.CENTRE],
        at.EMBEDDING_GROUP: table[at.GROUP], at.VOCABULARY: table[at.OUTPUTS], at.EMBEDDING_FACTOR: scale_of(model),
    }  # fmt: skip
    if learned is not None:
        facts |= {at.LEARNED: learned, at.LEARNED_CODE: CODES[learned.dtype], at.LEARNED_OFFSET: model.position_offset}
    return facts


class _Room:
    """Offsets in a thread's own memory."""

    def __init__(self, model: DecodeModel, max_rows: int, planes: int, span: int) -> None:
        block = block_of(max_rows)
        projections = [p for layer in model.layers for p in (layer.qkv, layer.output, layer.up, layer.down)]
        projections.append(model.head)
        widest = max(_chunks(p.weight.shape[1]) for p in projections)
        hidden, dim, group = _chunks(model.head.weight.shape[1]), model.head_dim, model.heads // model.kv_heads
        block_nbytes = _aligned(max(_packed_nbytes(p.weight, planes) for p in projections) * block)
        item_width = _aligned(4 * (max(_per_item(p.weight) for p in projections) + 16))
        prepared = _aligned(4 * max_rows * hidden)
        values = prepared + -(-max_rows // block) * block_nbytes
        item_out = values + _aligned(12 * widest + 256)
        attention_at = item_out + 9 * item_width + 64 * 8 * (item_width // 4)
        tables = 16 * (span + 16 + 16)
        attention = 8 * (group * dim + 16) + 4 * group * (span + 16) + tables + 64 * (dim + 32)
        self.nbytes = _aligned(attention_at + attention) + 128
        self.slots: dict[int, int] = {
            at.BLOCK_NBYTES: block_nbytes, at.ITEM_WIDTH: item_width, at.PREPARED: prepared, at.VALUES: values,
            at.ITEM_OUT: item_out, at.ATTENTION_AT: attention_at, at.OWN_NBYTES: self.nbytes,
        }  # fmt: skip


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _chunks(columns: int) -> int:
    return -(-columns // 32) * 32


def _packed_nbytes(weight: Tensor | QuantizedWeight, planes: int) -> int:
    """Of one activation row."""
    if isinstance(weight, Tensor):
        return 4 * _chunks(weight.shape[1])
    return weight.depth * planes + 4 * (planes + 2) * -(-weight.depth // weight.group_size)


def _per_item(weight: Tensor | QuantizedWeight) -> int:
    """Rows of an item: whole panels of some GRAIN_NBYTES."""
    outputs, columns = weight.shape
    row = columns * weight.element_size() if isinstance(weight, Tensor) else columns * weight.bits // 8
    return 16 * max(1, min(GRAIN_NBYTES // (16 * max(1, row)), -(-outputs // 16)))


def _projection(p: Projection) -> list[int]:
    weight, bias = p.weight, p.bias
    plus = [0, 0] if bias is None else [bias.data_ptr(), CODES[bias.dtype]]
    outputs, columns = weight.shape
    if isinstance(weight, Tensor):
        return [weight.data_ptr(), 0, 0, *plus, CODES[weight.dtype], outputs, columns, 0, 0, _per_item(weight), 0, 0]
    centre = 0 if weight.centre is None else weight.centre.data_ptr()
    record = [weight.codes.data_ptr(), weight.scale.data_ptr(), centre, *plus, weight.bits, outputs, columns]
    return [*record, weight.depth, weight.group_size, _per_item(weight), 0, 0]


def _norm(norm: Norm | None) -> list[int]:
    if norm is None:
        return [0] * at.NORM
    bias = [0, 0] if norm.bias is None else [norm.bias.data_ptr(), CODES[norm.bias.dtype]]
    kind = at.RMS if norm.kind == "rms" else at.LAYER_NORM
    return [
        norm.weight.data_ptr(),
        CODES[norm.weight.dtype],
        *bias,
        kind,
        word_of(float(norm.eps)),
        word_of(float(norm.offset)),
    ]


def _layer(layer: DecodeLayer, k_cache: Tensor, v_cache: Tensor) -> list[int]:
    rope = layer.rope
    turn = [0, 0, 0] if rope is None else [rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[1]]
    records = [word for p in (layer.qkv, layer.output, layer.up, layer.down) for word in _projection(p)]
    norms = (
        layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm, layer.attention_out_norm,
        layer.mlp_out_norm,
    )  # fmt: skip
    strides = [step * cache.element_size() for cache in (k_cache, v_cache) for step in cache.stride()[:3]]
    own = [*turn, layer.window or 0, k_cache.data_ptr(), v_cache.data_ptr(), *strides]
    return [*records, *(word for norm in norms for word in _norm(norm)), *own]


def _max_position(model: DecodeModel) -> int:
    limits = [layer.rope.cos.shape[0] for layer in model.layers if layer.rope is not None]
    if model.positions is not None:
        limits.append(model.positions.shape[0] - model.position_offset)
    return min(limits, default=1 << 62)


def why_not(model: DecodeModel, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]) -> str | None:
    """Why this decoder cannot run as one program; None: it can."""
    if not HAS_NUMBA:
        return "numba is not installed (pip install 'ds-kernels[cpu]'), or switched off by DS_KERNELS_NUMBA=0"
    for what, tensor in _tensors(model, k_caches, v_caches):
        if tensor.device.type != "cpu":
            return f"{what} is on {tensor.device}; a program runs on the CPU"
        if tensor.dtype not in CODES and tensor.dtype != torch.uint8:
            return f"{what} is of {tensor.dtype}; expected fp32, bf16 or fp16"
        if not tensor.is_contiguous() and "cache" not in what:
            return f"{what} has strides {tensor.stride()}; expected a contiguous tensor"
    first = k_caches[0]
    for cache in (*k_caches, *v_caches):
        if cache.shape != first.shape or cache.dtype != first.dtype or (cache.stride(-1) != 1 and cache.shape[-1] > 1):
            return (
                f"a cache is {cache.dtype} {tuple(cache.shape)} with strides {cache.stride()}; expected all alike, "
                "the last dimension contiguous"
            )
    return None


def _tensors(
    model: DecodeModel, k_caches: Iterable[Tensor], v_caches: Iterable[Tensor]
) -> Iterable[tuple[str, Tensor]]:
    """Everything that the program reads, by what it is."""
    yield from _weights("embedding", model.embedding)
    yield from (("a cache", cache) for caches in (k_caches, v_caches) for cache in caches)
    yield from _projected("head", model.head)
    if model.positions is not None:
        yield "positions", model.positions
    yield from _normed("final_norm", model.final_norm)
    for number, layer in enumerate(model.layers):
        for name in ("qkv", "output", "up", "down"):
            yield from _projected(f"layer {number}: {name}", getattr(layer, name))
        for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm", "attention_out_norm", "mlp_out_norm"):
            yield from _normed(f"layer {number}: {name}", getattr(layer, name))


def _weights(what: str, weight: Tensor | QuantizedWeight) -> Iterable[tuple[str, Tensor]]:
    if isinstance(weight, Tensor):
        yield what, weight
    else:
        yield from ((what, part) for part in (weight.codes, weight.scale, weight.centre) if part is not None)


def _projected(what: str, p: Projection) -> Iterable[tuple[str, Tensor]]:
    yield from _weights(what, p.weight)
    if p.bias is not None:
        yield f"{what}'s bias", p.bias


def _normed(what: str, norm: Norm | None) -> Iterable[tuple[str, Tensor]]:
    if norm is not None:
        yield what, norm.weight
        if norm.bias is not None:
            yield f"{what}'s bias", norm.bias
