"""Pure parts: range intersection at any world size, merging of records, JSON, the file format, client-state trees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ckpt_helpers import make_map, make_segments
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ds_zero.checkpoint.format import byte_view, dtype_from_name, dtype_name, plan_file, read_header
from ds_zero.checkpoint.manifest import (
    FileRecord,
    KeyRecord,
    Manifest,
    ParamRecord,
    RankRecord,
    Span,
    intersect,
    merge,
    record_from_json,
    record_to_json,
)
from ds_zero.checkpoint.shardfile import ShardPlan, ShardWriter, plan_shard, stream_file
from ds_zero.checkpoint.tree import decode_tree, encode_tree
from ds_zero.errors import CheckpointError
from ds_zero.layout import ParamSpec, ShardMap, plan_shard_map

shapes = st.lists(st.integers(0, 60), min_size=0, max_size=3).map(tuple)
models = st.lists(st.tuples(shapes, st.integers(0, 2), st.booleans()), min_size=1, max_size=8)


def build(model: Any, size: int, stage: int, num_blocks: int) -> ShardMap:
    specs = [
        ParamSpec(f"p{i}", shape, "bf16", trainable, group if trainable else -1)
        for i, (shape, group, trainable) in enumerate(model)
    ]
    blocks = [(f"b{b}", specs[b::num_blocks]) for b in range(num_blocks) if specs[b::num_blocks]]
    return plan_shard_map(blocks, num_shards=size, state_shards=1 if stage == 0 else size)


def records_of(shard_map: ShardMap) -> list[RankRecord]:
    records = []
    for rank in range(shard_map.num_shards):
        plan = plan_shard(rank, make_segments(shard_map, rank, export=True), {}, {})
        records.append(RankRecord(rank, FileRecord(f"f{rank}", plan.nbytes, ()), plan.params, plan.tensors, None, None))
    return records


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 7), st.integers(1, 7), st.integers(0, 1), st.integers(1, 3), st.integers(1, 3))
def test_every_reader_finds_every_element_once(
    model: Any, writers: int, readers: int, stage: int, write_blocks: int, read_blocks: int
) -> None:
    """Stored offsets are unique and increasing inside a span, and readers of any layout cover [0, numel) exactly."""
    params, _ = merge(records_of(build(model, writers, 3, write_blocks)))
    reader = build(model, readers, stage, read_blocks)
    counts = {name: np.zeros(param.numel, dtype=int) for name, param in params.items()}
    sources: dict[str, dict[int, tuple[int, int]]] = {}
    for rank in range(readers):
        for unit in reader.units:
            for piece in unit.pieces(*reader.state_range(unit, rank)):
                record = params[piece.slot.name].keys["master" if unit.trainable else "param"]
                itemsize = dtype_from_name(record.dtype).itemsize
                position = piece.start
                for span in intersect(record.spans, piece.start, piece.stop, itemsize):
                    assert span.start == position
                    position = span.stop
                    counts[piece.slot.name][span.start : span.stop] += 1
                    seen = sources.setdefault(piece.slot.name, {})
                    for i in range(span.start, span.stop):
                        place = (span.file, span.offset + (i - span.start) * itemsize)
                        assert seen.setdefault(i, place) == place
                assert position == piece.stop
    expected = readers if stage == 0 else 1
    for name, count in counts.items():
        assert (count == expected).all()
        assert len(set(sources.get(name, {}).values())) == params[name].numel


@settings(max_examples=30, deadline=None)
@given(models, st.integers(1, 7))
def test_pieces_lie_inside_their_files(model: Any, size: int) -> None:
    records = records_of(build(model, size, 3, 2))
    params, _ = merge(records)
    for param in params.values():
        for record in param.keys.values():
            itemsize = dtype_from_name(record.dtype).itemsize
            for span in record.spans:
                assert span.offset % itemsize == 0
                assert span.offset + (span.stop - span.start) * itemsize <= records[span.file].file.nbytes


def _record(rank: int, spans: list[Span], shape: tuple[int, ...] = (10,)) -> RankRecord:
    param = ParamRecord(shape, "bf16", 0, (), {"master": KeyRecord("F32", spans)}, {})
    return RankRecord(rank, FileRecord("f", 0, ()), {"w": param}, {}, None, None)


def test_merge_refuses_gaps_overlaps_and_other_shapes() -> None:
    merge([_record(0, [Span(0, 0, 4, 0)]), _record(1, [Span(1, 4, 10, 0)])])
    with pytest.raises(CheckpointError, match=r"'w': elements 4..5 of 10 are missing"):
        merge([_record(0, [Span(0, 0, 4, 0)]), _record(1, [Span(1, 5, 10, 0)])])
    with pytest.raises(CheckpointError, match=r"elements 3..4 of 10 are written twice"):
        merge([_record(0, [Span(0, 0, 4, 0)]), _record(1, [Span(1, 3, 10, 0)])])
    with pytest.raises(CheckpointError, match=r"elements 4..10 of 10 are missing"):
        merge([_record(0, [Span(0, 0, 4, 0)])])
    with pytest.raises(CheckpointError, match="different models"):
        merge([_record(0, [Span(0, 0, 4, 0)]), _record(1, [Span(1, 4, 10, 0)], (2, 5))])


def test_manifest_and_record_survive_json() -> None:
    records = records_of(make_map(3))
    records[0].file = FileRecord("f0", 9, ("0123456789abcdef", "f" * 16))
    assert [record_from_json(record_to_json(record)) for record in records] == records
    params, tensors = merge(records)
    manifest = Manifest(
        "t", "n", "0.1.0", 3, 3, 3, False, [r.file for r in records], params, tensors, {"a": 1}, [None] * 3
    )
    assert Manifest.from_json(manifest.to_json(), "x") == manifest


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format":"other"}'])
def test_a_damaged_manifest_is_named(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"where/manifest\.json"):
        Manifest.from_json(text, "where/manifest.json")


def test_a_newer_format_says_so() -> None:
    text = Manifest("t", "n", "9", 1, 1, 1, False, [], {}, {}, None, [], version=99).to_json()
    with pytest.raises(CheckpointError, match="newer than 1"):
        Manifest.from_json(text, "m")


def write_shard(plan: ShardPlan, path: Path) -> FileRecord:
    writer = ShardWriter(plan, path, defer=False)
    writer.write_now()
    return writer.write_rest()


def test_shard_file_is_safetensors(tmp_path: Path) -> None:
    shard_map = make_map(1)
    extras = {"a": torch.arange(5, dtype=torch.int64), "b": torch.tensor(3, dtype=torch.uint8), "c": torch.ones(2, 0)}
    plan = plan_shard(0, make_segments(shard_map, 0, export=True), extras, {"k": "v"})
    record = write_shard(plan, tmp_path / "x.safetensors")
    assert record.nbytes == plan.nbytes == (tmp_path / "x.safetensors").stat().st_size
    content = load_file(tmp_path / "x.safetensors")
    assert torch.equal(content["a"], extras["a"])
    assert content["b"] == 3
    assert content["c"].shape == (2, 0)
    entries, metadata, end = read_header(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"}
    assert end == record.nbytes
    assert all(entry.offset % dtype_from_name(entry.dtype).itemsize == 0 for entry in entries.values())


def test_non_contiguous_tensors_are_staged(tmp_path: Path) -> None:
    tensor = torch.arange(20).view(4, 5).t()
    plan = plan_shard(0, [], {"t": tensor}, {})
    write_shard(plan, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensor)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(CheckpointError, match="written twice"):
        plan_file([("a", torch.float32, (1,)), ("a", torch.float32, (1,))], {})


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match="complex64"):
        dtype_name(torch.complex64)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 64])
def test_a_damaged_header_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_streams_are_cut_into_chunks(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 9_000_001, dtype=np.uint8).tobytes()
    view = memoryview(data)
    record = stream_file(
        tmp_path / "x", [view[:5], view[5:4_194_304], view[4_194_304:4_194_305], view[4_194_305:]], len(data)
    )
    assert (tmp_path / "x").read_bytes() == data
    assert len(record.chunks) == 3
    assert record.chunks == stream_file(tmp_path / "y", [view], len(data)).chunks


def test_byte_view_is_the_memory() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    byte_view(tensor)[1] = 0x3F
    byte_view(tensor)[0] = 0x80
    assert tensor[0] == 1.0


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
keys = st.text(max_size=3) | st.integers() | st.just("$ds")
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@settings(max_examples=150, deadline=None)
@given(trees)
def test_trees_survive(tree: Any) -> None:
    import json

    tensors: dict[str, torch.Tensor] = {}
    assert same(tree, decode_tree(json.loads(json.dumps(encode_tree(tree, "x", tensors))), tensors))


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": [object()]}, r"client_state\['a'\]\[0\] is a builtins.object"),
        ({"a": {"b": {1, 2}}}, r"client_state\['a'\]\['b'\]"),
        ({(1, 2): 3}, r"client_state has a key \(1, 2\)"),
        ({"f": len}, r"client_state\['f'\]"),
        ({"c": torch.ones(1, dtype=torch.complex64)}, r"client_state\['c'\]"),
        ({"n": np.array([object()])}, r"client_state\['n'\]"),
    ],
)
def test_what_a_tree_cannot_hold_is_named(tree: Any, path: str) -> None:
    with pytest.raises(TypeError, match=path):
        encode_tree(tree, "x", {})


def test_a_tree_that_contains_itself() -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(TypeError, match="contains itself"):
        encode_tree(tree, "x", {})
