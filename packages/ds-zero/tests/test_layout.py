"""The shard map: slots, pieces and segments cover everything once, aligned, at any number of shards."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_zero.errors import LayoutError
from ds_zero.layout import ALIGNMENT, FROZEN, ParamSpec, ShardMap, plan_shard_map

shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
specs = st.lists(
    st.tuples(shapes, st.sampled_from(["float32", "bfloat16"]), st.integers(-1, 2)), min_size=1, max_size=12
)


def make(drawn: list[tuple[tuple[int, ...], str, int]], shards: int, cut: int, threshold: int) -> ShardMap:
    made = [ParamSpec(f"p{i}", shape, dtype, group != FROZEN, group) for i, (shape, dtype, group) in enumerate(drawn)]
    blocks = [("a", made[:cut]), ("b", made[cut:])]
    return plan_shard_map(blocks, num_shards=shards, persistence_threshold=threshold)


@settings(max_examples=150, deadline=None)
@given(specs, st.integers(1, 7), st.integers(0, 12), st.integers(0, 80))
def test_everything_is_covered_once(
    drawn: list[tuple[tuple[int, ...], str, int]], shards: int, cut: int, threshold: int
) -> None:
    shard_map = make(drawn, shards, cut, threshold)
    names = [slot.name for unit in shard_map.units for slot in unit.slots]
    assert sorted(names) == sorted(f"p{i}" for i in range(len(drawn)))
    for unit in shard_map.units:
        assert unit.padded_numel % (shards * ALIGNMENT) == 0
        assert unit.padded_numel - unit.slots[-1].stop < shards * ALIGNMENT
        assert [slot.group for slot in unit.slots] == sorted(slot.group for slot in unit.slots)
        covered = [0] * unit.padded_numel
        for slot in unit.slots:
            assert slot.offset % ALIGNMENT == 0
        owned = {slot.name: 0 for slot in unit.slots}
        for rank in range(shards):
            start, stop = unit.shard_range(rank)
            segments = unit.segments(start, stop)
            assert len({s.group for s in segments}) == len(segments)
            for piece in unit.pieces(start, stop):
                owned[piece.slot.name] += piece.numel
                inside = [
                    s for s in segments if s.offset <= piece.offset and piece.offset + piece.numel <= s.offset + s.numel
                ]
                assert [s.group for s in inside] == [piece.slot.group]
                for element in range(start + piece.offset, start + piece.offset + piece.numel):
                    covered[element] += 1
            for segment in segments:
                assert segment.offset % ALIGNMENT == segment.numel % ALIGNMENT == 0
                assert segment.offset + segment.numel <= stop - start
        assert owned == {slot.name: slot.numel for slot in unit.slots}
        for low, high in unit.gaps:
            for element in range(low, high):
                assert covered[element] == 0
                covered[element] = 1
        assert covered == [1] * unit.padded_numel
        if unit.persistent:
            assert max(slot.numel for slot in unit.slots) <= threshold
    assert shard_map.numel + shard_map.padding_numel == sum(unit.padded_numel for unit in shard_map.units)


@given(specs, st.integers(1, 5))
def test_where_a_parameter_lies_in_its_unit_does_not_depend_on_the_shards(
    drawn: list[tuple[tuple[int, ...], str, int]], shards: int
) -> None:
    one, many = make(drawn, 1, 6, 0), make(drawn, shards, 6, 0)
    assert [unit.slots for unit in one.units] == [unit.slots for unit in many.units]


def test_find_and_fingerprint() -> None:
    tied = ParamSpec("embed", (3, 5), "float32", True, 0, ("head",))
    shard_map = plan_shard_map([("a", [tied])], num_shards=2)
    assert shard_map.find("head") == shard_map.find("embed")
    with pytest.raises(LayoutError, match="'haed'"):
        shard_map.find("haed")
    assert shard_map.fingerprint() != plan_shard_map([("a", [tied])], num_shards=3).fingerprint()
    assert shard_map.state_range(shard_map.units[0], 1) == (32, 64)
    replicated = plan_shard_map([("a", [tied])], num_shards=2, state_shards=1)
    assert replicated.state_range(replicated.units[0], 1) == (0, 64)


def test_persistence_stops_at_its_total() -> None:
    blocks = [("a", [ParamSpec(f"p{i}", (10,), "float32", True, 0) for i in range(5)])]
    shard_map = plan_shard_map(blocks, num_shards=2, persistence_threshold=10, persistence_total=25)
    assert {unit.name: len(unit.slots) for unit in shard_map.units} == {"a": 3, "persistent#float32": 2}


def test_what_cannot_be_laid_out() -> None:
    spec = ParamSpec("p", (3,), "float32", True, 0)
    with pytest.raises(LayoutError, match="'p' is in unit 'a' and in unit 'b'"):
        plan_shard_map([("a", [spec]), ("b", [spec])], num_shards=1)
    with pytest.raises(LayoutError, match="no parameters"):
        plan_shard_map([("a", [])], num_shards=1)
    with pytest.raises(LayoutError, match="num_shards is 0"):
        plan_shard_map([("a", [spec])], num_shards=0)
