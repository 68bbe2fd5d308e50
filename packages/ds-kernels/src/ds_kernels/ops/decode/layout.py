"""How a decoder lies in the tables of 64-bit words that the numba program reads: offsets, shared by both sides.

A *projection* and a *norm* are records of words; a layer is its records one after the other, then words of its own.
Tensors are addresses, floats the bits of doubles. The program holds these numbers as constants: after editing them,
delete its compiled files (see `_cpu.launch`).
"""

from __future__ import annotations

__all__ = ["ACTIVATIONS", "LAYER", "MAX_SPLITS", "NORM", "PROJECTION", "SPAN"]

WEIGHT, SCALE, CENTRE, BIAS, BIAS_CODE, KIND, OUTPUTS, COLUMNS, DEPTH, GROUP, PER_ITEM, PACK, PRODUCT = range(13)
"""Words of a projection. KIND: a dtype code of dense weights (0 fp32, 1 bf16, 2 fp16), or 8, 4: bits of quantised.
PACK, PRODUCT: addresses of the steps that prepare a row of activations and multiply an item."""
PROJECTION = 13
NORM_WEIGHT, NORM_CODE, NORM_BIAS, NORM_BIAS_CODE, NORM_KIND, NORM_EPS, NORM_OFFSET = range(7)
"""Words of a norm."""
NORM = 7
NONE, RMS, LAYER_NORM = range(3)
"""Kinds of norms."""
QKV, OUTPUT, UP, DOWN = (i * PROJECTION for i in range(4))
_NORMS = 4 * PROJECTION
ATTENTION_NORM, MLP_NORM, QUERY_NORM, KEY_NORM, ATTENTION_OUT_NORM, MLP_OUT_NORM = (_NORMS + i * NORM for i in range(6))
_OWN = _NORMS + 6 * NORM
COS, SIN, ROPE_WIDTH, WINDOW, K_CACHE, V_CACHE, K_PAGE, K_HEAD, K_ROW, V_PAGE, V_HEAD, V_ROW = (
    _OWN + i for i in range(12)
)
"""Words of a layer; strides of the caches are bytes."""
LAYER = _OWN + 12
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
SPAN = 64
"""Keys of a split, or a multiple of it: see `MAX_SPLITS`."""
MAX_SPLITS = 32
"""Splits of a context: longer ones have longer splits, by their own length only."""

HEAD = 3
(
    TOKENS, POSITIONS, SLOTS, TABLES, LENGTHS, LOGITS, ROWS, PAGES_WIDTH, LAYERS, NUM_LAYERS, FINAL_NORM, HEAD_AT,
    EMBEDDING, EMBEDDING_KIND, EMBEDDING_SCALE_AT, EMBEDDING_CENTRE, EMBEDDING_GROUP, VOCABULARY, EMBEDDING_FACTOR,
    LEARNED, LEARNED_CODE, LEARNED_OFFSET, HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE, ACTIVATION, GATED,
    SCALE_OF_SCORES, ATTENTION_SOFTCAP, LOGIT_SOFTCAP, CACHE_CODE, PAGE_SIZE, PAGES, MAX_POSITION, PLANES, SPAN_MAX,
    SYNC, OWN, OWN_NBYTES, QKV_OUT, PARTIALS, MIXED, UP_OUT, BLOCK_NBYTES, PREPARED, VALUES, ITEM_OUT, ITEM_WIDTH,
    ATTENTION_AT, ATTEND, TEAM_SIZE_AT, TEAM_INDEX_AT, YIELD_AT, SELF, ERROR,
) = range(HEAD, HEAD + 57)  # fmt: skip
"""Slots of the program. SYNC: the barrier's counter, then those of `team`. OWN: per thread its residual stream, then at
PREPARED packed activations, at VALUES a row, at ITEM_OUT an item's results, at ATTENTION_AT the attention's scratch.
ATTEND: the address of the step that does an item of attention. SELF: that of
the slots."""
SLOTS_END = HEAD + 57
