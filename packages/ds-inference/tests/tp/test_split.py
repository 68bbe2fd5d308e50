"""Splits of heads and features: everything once, heads whole, groups equal on every rank."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_inference.errors import ModelError
from ds_inference.tp.split import HeadSplit, split_features, split_heads

ranks = st.integers(1, 8)


@given(st.integers(1, 300), ranks, st.integers(1, 64))
def test_features_are_covered_once_by_ranges_of_whole_grains(size: int, num_ranks: int, grain: int) -> None:
    if size < num_ranks:
        with pytest.raises(ModelError, match=f"{size} features cannot be split over {num_ranks} ranks"):
            split_features(size, num_ranks, grain)
        return
    ranges = split_features(size, num_ranks, grain)
    assert len(ranges) == num_ranks and ranges[0][0] == 0 and ranges[-1][1] == size
    assert all(low < high for low, high in ranges)
    assert all(one[1] == other[0] for one, other in pairwise(ranges))
    if size // grain >= num_ranks:
        assert all(low % grain == 0 for low, _ in ranges)
        sizes = [(high - low) // grain for low, high in ranges]
        assert max(sizes) - min(sizes) <= 1


@st.composite
def head_splits(draw: st.DrawFn) -> HeadSplit:
    kv, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return split_heads(kv * group, kv, draw(st.integers(1, min(8, kv * group))))


@given(head_splits())
def test_ranks_hold_whole_heads_in_equal_groups(split: HeadSplit) -> None:
    group = split.num_heads // split.num_kv_heads
    queries = [head for low, high in split.query for head in range(low, high)]
    assert queries == list(range(split.num_heads))
    for (q_low, q_high), (kv_low, kv_high) in zip(split.query, split.kv, strict=True):
        assert q_low < q_high and kv_low < kv_high
        assert (q_high - q_low) % (kv_high - kv_low) == 0
        local = (q_high - q_low) // (kv_high - kv_low)
        for head in range(q_low, q_high):  # local grouped attention reads the key/value head that the model reads
            assert kv_low + (head - q_low) // local == head // group
    keys = sorted({head for low, high in split.kv for head in range(low, high)})
    assert keys == list(range(split.num_kv_heads))
    assert split.copied == (sum(high - low for low, high in split.kv) > split.num_kv_heads)


@given(head_splits(), st.integers(1, 4))
def test_fused_projections_hold_the_same_heads(split: HeadSplit, head_dim: int) -> None:
    """Both layouts, element by element, against a list of whose element each one is."""
    heads, kv = split.num_heads, split.num_kv_heads
    group = heads // kv
    flat = [("q", n) for n in range(heads)] + [("k", n) for n in range(kv)] + [("v", n) for n in range(kv)]
    grouped = [one for n in range(kv) for one in [*(("q", n * group + i) for i in range(group)), ("k", n), ("v", n)]]
    for rank in range(len(split.query)):
        expected = {("q", n) for n in range(*split.query[rank])}
        expected |= {(what, n) for what in "kv" for n in range(*split.kv[rank])}
        for labels, piece in ((flat, split.of_qkv(rank, head_dim)), (grouped, split.of_groups(rank, head_dim))):
            elements = [at for low, high in piece for at in range(low, high)]
            assert len(set(elements)) == len(elements) == len(expected) * head_dim
            assert {labels[at // head_dim] for at in elements} == expected
            assert elements == sorted(elements)


def test_uneven_heads_of_a_real_model() -> None:
    """SmolLM2-135M has 9 heads in 3 groups."""
    assert split_heads(9, 3, 2).query == ((0, 6), (6, 9))
    split = split_heads(9, 3, 4)
    assert split.query == ((0, 2), (2, 3), (3, 6), (6, 9)) and split.kv == ((0, 1), (0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize(
    ("heads", "kv", "num_ranks", "text"),
    [
        (4, 2, 8, r"4 query heads \(2 groups of 2\) cannot be split over 8 ranks: 4 ranks would share a group"),
        (6, 4, 2, "6 query heads over 4 key/value heads; expected a multiple"),
        (6, 0, 2, "expected a multiple"),
    ],
)
def test_what_cannot_be_split(heads: int, kv: int, num_ranks: int, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        split_heads(heads, kv, num_ranks)
