"""One launch for one token of every sequence: all threads walk through all layers, five stages each.

    1  norm of the residual stream; queries, keys and values
    2  attention, with norms of heads, rotary embedding and the write to the caches
    3  the splits of a context put together; output projection
    4  residual, norm; gate and up
    5  activation; down

Between stages threads meet at a barrier (`_cpu.team`). What is cheap and all need (the residual stream, norms, packed
activations) every thread computes for itself, so a stage writes shared memory only with its products. Rows of a batch
are computed in blocks of 1, 2, 4 or 8, always by the same operations in the same order: neither the other rows nor the
number of threads change a bit. Functions are compiled without liberties (see `launch` on sums).
"""
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-call,no-untyped-def,no-any-return,index"

from __future__ import annotations

import numpy as np
from numba import njit

from ds_kernels._cpu.intrinsics import bf16_to_f32, f32_at, float_at, i32_at, i64_at, load_at, u8_at, u16_at
from ds_kernels._cpu.launch import kernel
from ds_kernels._cpu.maths import normal_cdf, sigmoid
from ds_kernels._cpu.team import LINE, barrier, invoke, member, team
from ds_kernels.ops.decode import layout as at
from ds_kernels.ops.decode.attention_numba import attention, mixed, norm
from ds_kernels.ops.decode.products import block_of, product, warm

__all__ = ["DECODE"]


@njit(cache=True, inline="never")
def _fits(a):
    """Whether every index of the call lies where there is something; else an error's number (`cpu.ERRORS`)."""
    rows, size = a[at.ROWS], a[at.PAGE_SIZE]
    tokens, positions, slots = i64_at(a[at.TOKENS], rows), i64_at(a[at.POSITIONS], rows), i64_at(a[at.SLOTS], rows)
    lengths, width = i32_at(a[at.LENGTHS], rows), a[at.PAGES_WIDTH]
    for row in range(rows):
        if tokens[row] < 0 or tokens[row] >= a[at.VOCABULARY]:
            return 1
        if positions[row] < 0 or positions[row] >= a[at.MAX_POSITION]:
            return 2
        if slots[row] >= a[at.PAGES] * size:
            return 3
        if lengths[row] < 0 or lengths[row] > width * size:
            return 4
        table = i32_at(a[at.TABLES] + 4 * row * width, width)
        for place in range((lengths[row] + size - 1) // size):
            if table[place] < 0 or table[place] >= a[at.PAGES]:
                return 5
    return 0


@njit(cache=True, inline="never")
def _embed(a, row, out):
    """The residual stream of a row at its start."""
    hidden, token = a[at.HIDDEN], i64_at(a[at.TOKENS], row + 1)[row]
    kind, group = a[at.EMBEDDING_KIND], a[at.EMBEDDING_GROUP]
    if kind < 4:
        load_at(a[at.EMBEDDING] + token * hidden * (4 if kind == 0 else 2), kind, hidden, out)
    else:
        depth = (hidden + 31) // 32 * 32
        groups, panel, lane = (depth + group - 1) // group, token // 16, token % 16
        codes = u8_at(a[at.EMBEDDING] + panel * depth * 2 * kind, depth * 2 * kind)
        scale = u16_at(a[at.EMBEDDING_SCALE_AT] + 32 * panel * groups, 16 * groups)
        for c in range(hidden):
            if kind == 8:
                code = np.int64(codes[c // 4 * 64 + lane * 4 + c % 4]) - 128
            else:
                pair = np.int64(codes[c // 8 * 64 + lane * 4 + c % 4])
                code = ((pair >> 4) if c % 8 >= 4 else (pair & 15)) - 8
            place = c // group * 16 + lane
            out[c] = np.float32(code) * bf16_to_f32(scale[place])
            if a[at.EMBEDDING_CENTRE]:
                centre = u16_at(a[at.EMBEDDING_CENTRE] + 32 * panel * groups, 16 * groups)
                out[c] += bf16_to_f32(centre[place])
    factor = np.float32(float_at(a, at.EMBEDDING_FACTOR))
    for c in range(hidden):
        out[c] *= factor


@njit(cache=True, inline="never")
def _start(a, row, stream, values):
    """`_embed`, and the learned position."""
    hidden = a[at.HIDDEN]
    padded = (hidden + 31) // 32 * 32
    x = f32_at(stream, padded)
    _embed(a, row, x)
    for c in range(hidden, padded):
        x[c] = np.float32(0.0)
    if a[at.LEARNED]:
        code, position = a[at.LEARNED_CODE], i64_at(a[at.POSITIONS], row + 1)[row] + a[at.LEARNED_OFFSET]
        more = f32_at(values, hidden)
        load_at(a[at.LEARNED] + position * hidden * (4 if code == 0 else 2), code, hidden, more)
        for c in range(hidden):
            x[c] += more[c]


@njit(cache=True, inline="never")
def _add(record_at, stream, result, count, values, scratch):
    """stream += result, by a norm if there is one."""
    x, y = f32_at(stream, count), f32_at(result, count)
    if i64_at(record_at, at.NORM)[at.NORM_KIND] != at.NONE:
        padded = (count + 15) // 16 * 16
        copy = f32_at(values, padded)
        for c in range(count):
            copy[c] = y[c]
        for c in range(count, padded):
            copy[c] = np.float32(0.0)
        norm(record_at, values, count, scratch, scratch + 4 * padded)
        y = f32_at(scratch, count)
    for c in range(count):
        x[c] += y[c]


@njit(cache=True, inline="never")
def _activate(activation, gated, source, count, out):
    """out = act(gate) * up, or act(up)."""
    gate, up, target = f32_at(source, count), f32_at(source + 4 * count, count), f32_at(out, count)
    if activation == 0:
        for i in range(count):
            target[i] = gate[i] * sigmoid(gate[i])
    elif activation == 1:
        for i in range(count):
            target[i] = gate[i] * normal_cdf(gate[i])
    elif activation == 2:
        for i in range(count):
            cube = np.float32(np.float32(0.044715) * gate[i] * gate[i] * gate[i])
            target[i] = gate[i] * sigmoid(np.float32(np.float32(1.5957691216057308) * np.float32(gate[i] + cube)))
    else:
        for i in range(count):
            target[i] = max(gate[i], np.float32(0.0))
    if gated:
        for i in range(count):
            target[i] *= up[i]


@njit(cache=True, inline="always")
def _fill_up(values, count):
    """Zeros up to a whole chunk."""
    padded = (count + 31) // 32 * 32
    row = f32_at(values, padded)
    for i in range(count, padded):
        row[i] = np.float32(0.0)


@njit(cache=True, inline="never")
def _pack_empty(p, rows, block, planes, prepared, block_nbytes, values, count):
    """Zeros for the rows that fill the last block up."""
    if rows % block == 0:
        return
    _clear(values, count)
    for row in range(rows, (rows + block - 1) // block * block):
        invoke(i64_at(p, at.PROJECTION)[at.PACK], (p, values, row, block, planes, prepared, block_nbytes))


@njit(cache=True, inline="always")
def _clear(values, count):
    padded = (count + 31) // 32 * 32
    row = f32_at(values, padded)
    for i in range(padded):
        row[i] = np.float32(0.0)


@njit(cache=True, inline="never")
def _normed(a, p, record_at, own, block):
    """Pack the norm of every row of the residual stream for the projection at p."""
    hidden, rows, planes = a[at.HIDDEN], a[at.ROWS], a[at.PLANES]
    padded, values, prepared = (hidden + 31) // 32 * 32, own + a[at.VALUES], own + a[at.PREPARED]
    for row in range(rows):
        norm(record_at, own + 4 * row * padded, hidden, values, values + 4 * padded)
        _fill_up(values, hidden)
        invoke(i64_at(p, at.PROJECTION)[at.PACK], (p, values, row, block, planes, prepared, a[at.BLOCK_NBYTES]))
    _pack_empty(p, rows, block, planes, prepared, a[at.BLOCK_NBYTES], values, hidden)


@njit(cache=True, inline="never")
def _product(a, p, own, block, softcap, out, size, stage, index):
    product(
        p, a[at.ROWS], block, a[at.PLANES], own + a[at.PREPARED], a[at.BLOCK_NBYTES], own + a[at.ITEM_OUT],
        a[at.ITEM_WIDTH], softcap, out, a[at.SYNC] + LINE, size, stage, index,
    )  # fmt: skip


@njit(cache=True, inline="never")
def _add_all(a, record_at, own):
    """The last projection's results into the residual stream."""
    hidden, values = a[at.HIDDEN], own + a[at.VALUES]
    padded = (hidden + 31) // 32 * 32
    for row in range(a[at.ROWS]):
        at_stream, result = own + 4 * row * padded, a[at.MIXED] + 4 * row * hidden
        _add(record_at, at_stream, result, hidden, values, values + 4 * padded)


@njit(cache=True, inline="never")
def _attention_to_output(a, layer, layer_at, own, block):
    """Pack what attention gave for the output projection."""
    width, values, prepared = a[at.HEADS] * a[at.DIM], own + a[at.VALUES], own + a[at.PREPARED]
    p = layer_at + 8 * at.OUTPUT
    for row in range(a[at.ROWS]):
        mixed(a, layer, row, values)
        _fill_up(values, width)
        invoke(i64_at(p, at.PROJECTION)[at.PACK], (p, values, row, block, a[at.PLANES], prepared, a[at.BLOCK_NBYTES]))
    _pack_empty(p, a[at.ROWS], block, a[at.PLANES], prepared, a[at.BLOCK_NBYTES], values, width)


@njit(cache=True, inline="never")
def _mlp_to_down(a, layer_at, own, block):
    """Pack the activated MLP for the down projection."""
    inner, values, prepared = a[at.INTERMEDIATE], own + a[at.VALUES], own + a[at.PREPARED]
    p, width = layer_at + 8 * at.DOWN, a[at.INTERMEDIATE] * (2 if a[at.GATED] else 1)
    for row in range(a[at.ROWS]):
        _activate(a[at.ACTIVATION], a[at.GATED], a[at.UP_OUT] + 4 * row * width, inner, values)
        _fill_up(values, inner)
        invoke(i64_at(p, at.PROJECTION)[at.PACK], (p, values, row, block, a[at.PLANES], prepared, a[at.BLOCK_NBYTES]))
    _pack_empty(p, a[at.ROWS], block, a[at.PLANES], prepared, a[at.BLOCK_NBYTES], values, inner)


@njit(cache=True, inline="never")
def _run(a, size, index):
    """What one thread of the team does."""
    error = _fits(a)
    if error:
        a[at.ERROR] = error
        return
    own, meeting, yield_at = a[at.OWN] + index * a[at.OWN_NBYTES], a[at.SYNC], a[at.YIELD_AT]
    rows, hands, stage, none = a[at.ROWS], a[at.SYNC] + LINE, 0, np.float32(0.0)
    block, padded = block_of(rows), (a[at.HIDDEN] + 31) // 32 * 32
    for row in range(rows):
        _start(a, row, own + 4 * row * padded, own + a[at.VALUES])
    for number in range(a[at.NUM_LAYERS]):
        here = a[at.LAYERS] + 8 * at.LAYER * number
        layer = i64_at(here, at.LAYER)
        if number:
            _add_all(a, here + 8 * (at.MLP_OUT_NORM - at.LAYER), own)
        _normed(a, here + 8 * at.QKV, here + 8 * at.ATTENTION_NORM, own, block)
        _product(a, here + 8 * at.QKV, own, block, none, a[at.QKV_OUT], size, stage, index)
        warm(here + 8 * at.OUTPUT, size, index)
        barrier(meeting, size, stage + 1, yield_at)
        attention(a, layer, own + a[at.ATTENTION_AT], hands, size, stage + 1, index)
        barrier(meeting, size, stage + 2, yield_at)
        _attention_to_output(a, layer, here, own, block)
        _product(a, here + 8 * at.OUTPUT, own, block, none, a[at.MIXED], size, stage + 2, index)
        warm(here + 8 * at.UP, size, index)
        barrier(meeting, size, stage + 3, yield_at)
        up = here + 8 * at.UP
        if layer[at.MLP_NORM + at.NORM_KIND] == at.NONE:
            _normed(a, up, here + 8 * at.ATTENTION_NORM, own, block)
            _add_all(a, here + 8 * at.ATTENTION_OUT_NORM, own)
        else:
            _add_all(a, here + 8 * at.ATTENTION_OUT_NORM, own)
            _normed(a, up, here + 8 * at.MLP_NORM, own, block)
        _product(a, up, own, block, none, a[at.UP_OUT], size, stage + 3, index)
        warm(here + 8 * at.DOWN, size, index)
        barrier(meeting, size, stage + 4, yield_at)
        _mlp_to_down(a, here, own, block)
        _product(a, here + 8 * at.DOWN, own, block, none, a[at.MIXED], size, stage + 4, index)
        warm(here + 8 * (at.LAYER + at.QKV) if number + 1 < a[at.NUM_LAYERS] else a[at.HEAD_AT], size, index)
        barrier(meeting, size, stage + 5, yield_at)
        stage += 5
    _add_all(a, a[at.LAYERS] + 8 * (at.LAYER * (a[at.NUM_LAYERS] - 1) + at.MLP_OUT_NORM), own)
    _normed(a, a[at.HEAD_AT], a[at.FINAL_NORM], own, block)
    _product(a, a[at.HEAD_AT], own, block, np.float32(float_at(a, at.LOGIT_SOFTCAP)), a[at.LOGITS], size, stage, index)


@kernel
def DECODE(a):
    """Slots: see `layout`. Every thread of the team runs it once."""
    size = team(a[at.TEAM_SIZE_AT])
    _run(a, size, member(a[at.TEAM_INDEX_AT], size))
