"""Splits are optimal (against brute force), even where ties leave room, deterministic, and errors say what to do."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pipe import PartitionError, balanced, partition_layers, uniform

weight = st.one_of(st.integers(0, 9), st.floats(0, 10), st.fractions(0, 5, max_denominator=9))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, list[float]]:
    weights = draw(st.lists(weight, min_size=1, max_size=9))
    parts = draw(st.integers(1, len(weights)))
    return weights, parts, draw(st.lists(weight, min_size=parts, max_size=parts))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_split_is_better(problem: tuple[list[float], int, list[float]]) -> None:
    """The heaviest part is the lightest possible, then the sum of squares; exact arithmetic on both sides."""
    weights, parts, extra = problem
    bounds = balanced(weights, parts, extra=extra)

    def value(split: tuple[int, ...]) -> tuple[Fraction, Fraction]:
        spans = zip(split, split[1:], extra, strict=False)
        loads = [sum(map(Fraction, weights[a:b]), Fraction(more)) for a, b, more in spans]
        return max(loads), sum((load * load for load in loads), Fraction())

    every = [(0, *cuts, len(weights)) for cuts in combinations(range(1, len(weights)), parts - 1)]
    assert bounds in every
    assert value(bounds) == min(map(value, every))
    assert bounds == balanced(weights, parts, extra=extra)


@given(st.integers(1, 60), st.integers(1, 60))
def test_uniform_counts_differ_by_one_at_most(items: int, parts: int) -> None:
    if items < parts:
        with pytest.raises(PartitionError, match=f"{items} layers cannot fill {parts} stages"):
            uniform(items, parts)
        return
    bounds = uniform(items, parts)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert sum(sizes) == items and sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


def test_a_heavy_head_moves_the_cut() -> None:
    """30 equal layers and a head worth 10 of them: 20 + 10, whether the head is a layer or an extra."""
    assert balanced([1.0] * 30 + [10.0], 2) == (0, 20, 31)
    assert balanced([1.0] * 30, 2, extra=[0, 10]) == (0, 20, 30)


def test_thousands_of_layers_are_split() -> None:
    weights = [(7 * i) % 11 + 1 for i in range(2000)]
    bounds = balanced(weights, 64)
    loads = [sum(weights[a:b]) for a, b in pairwise(bounds)]
    assert max(loads) <= -(-sum(weights) // 64) + 11


def test_methods_by_name() -> None:
    names = ["Embedding", "Block", "Block", "Norm", "Block", "Block", "Head"]
    assert partition_layers("uniform", 2, names=names) == (0, 4, 7)
    assert partition_layers("Parameters", 2, parameters=[9, 1, 1, 1, 1, 1, 1]) == (0, 1, 7)
    bounds = partition_layers("type:block", 2, names=names)
    assert [sum(name == "Block" for name in names[a:b]) for a, b in pairwise(bounds)] == [2, 2]
    assert partition_layers("profile", 2, costs=[0.1] * 6, extra=[0, 0.2]) == (0, 4, 6)
    # Case is ignored in what is found, not in the pattern's own escapes: \\D is not \\d.
    assert partition_layers(r"type:^\D+$", 2, names=["a", "b", "c1"]) == (0, 1, 3)


@pytest.mark.parametrize(
    ("method", "given", "text"),
    [
        ("best", {}, "method 'best' is unknown"),
        ("parameters", {}, "needs parameters"),
        ("uniform", {}, "needs names, parameters or costs"),
        ("profile", {"parameters": [1, 2]}, "needs costs"),
        ("type:Attention", {"names": ["Block", "Head"]}, "finds 0 of 2 layers.*Block, Head"),
        ("parameters", {"parameters": [1]}, "1 layers cannot fill 2 stages"),
        ("profile", {"costs": [1.0, float("nan")]}, "weight nan"),
        ("profile", {"costs": [1.0, -1.0]}, "weight -1.0"),
        ("profile", {"costs": [1.0, 1.0], "extra": [1.0]}, "extra has 1 entries; expected 2"),
    ],
)
def test_errors_say_what_was_expected(method: str, given: dict[str, list[float]], text: str) -> None:
    with pytest.raises(PartitionError, match=text):
        partition_layers(method, 2, **given)  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match="0 stages"):
        uniform(3, 0)
