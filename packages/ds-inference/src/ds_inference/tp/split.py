"""Splits of one dimension over tensor-parallel ranks, as numbers only.

A **range** is (start, stop); a rank's **piece** of a dimension is a tuple of ranges, laid one after the other. Heads
are never cut. Query heads that share a key/value head (a **group**) stay with it: a rank holds whole groups, or a part
of one together with a copy of that group's key/value head. So what a rank holds is again grouped-query attention with
equal groups, and needs no other attention code.
Source: Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053); the copies of key/value heads: Pope et al. 2022.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from ds_inference.errors import ModelError

__all__ = ["HeadSplit", "Piece", "Range", "split_features", "split_heads"]

Range = tuple[int, int]
Piece = tuple[Range, ...]


def split_features(size: int, num_ranks: int, grain: int = 1) -> tuple[Range, ...]:
    """One range per rank, whole multiples of `grain` where there are enough of them, else of 8, else of 1.

    What is over goes last (some kernels need rows of whole 16 bytes, thus 8). The first ranks have one grain more when
    it does not come out even. ModelError for fewer features than ranks.
    """
    if size < num_ranks:
        raise ModelError(f"{size} features cannot be split over {num_ranks} ranks; use at most {size} ranks")
    unit = next((unit for unit in (grain, 8) if size // unit >= num_ranks), 1)
    share, more = divmod(size // unit, num_ranks)
    bounds = [(rank * share + min(rank, more)) * unit for rank in range(num_ranks)] + [size]
    return tuple(pairwise(bounds))


@dataclass(frozen=True)
class HeadSplit:
    """Per rank a range of query heads and one of key/value heads."""

    num_heads: int
    num_kv_heads: int
    query: tuple[Range, ...]
    kv: tuple[Range, ...]

    @property
    def copied(self) -> bool:
        """Whether some key/value head is on several ranks."""
        return len(self.kv) > self.num_kv_heads

    def of_query(self, rank: int, head_dim: int) -> Piece:
        return (_scaled(self.query[rank], head_dim),)

    def of_kv(self, rank: int, head_dim: int) -> Piece:
        return (_scaled(self.kv[rank], head_dim),)

    def of_qkv(self, rank: int, head_dim: int) -> Piece:
        """Of a fused projection [all queries | all keys | all values]."""
        low, high = self.kv[rank]
        keys, values = self.num_heads, self.num_heads + self.num_kv_heads
        heads = (self.query[rank], (keys + low, keys + high), (values + low, values + high))
        return _merged(_scaled(one, head_dim) for one in heads)

    def of_groups(self, rank: int, head_dim: int) -> Piece:
        """Of a fused projection that has per key/value head its queries, its key and its value."""
        group = self.num_heads // self.num_kv_heads
        first, last = self.query[rank]
        heads: list[Range] = []
        for kv in range(*self.kv[rank]):
            base = kv * (group + 2)
            low, high = max(first - kv * group, 0), min(last - kv * group, group)
            heads += [(base + low, base + high), (base + group, base + group + 2)]
        return _merged(_scaled(one, head_dim) for one in heads)


def split_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> HeadSplit:
    """Heads over ranks as the module says, as evenly as that allows.

    ModelError when a rank would have no head, or the key/value heads do not divide the query heads.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ModelError(
            f"{num_heads} query heads over {num_kv_heads} key/value heads; expected a multiple: groups of equal size"
        )
    group = num_heads // num_kv_heads
    if num_kv_heads >= num_ranks:
        kv = split_features(num_kv_heads, num_ranks)
        return HeadSplit(num_heads, num_kv_heads, tuple((low * group, high * group) for low, high in kv), kv)
    owners = split_features(num_ranks, num_kv_heads)  # ranges of ranks, one per key/value head
    most = max(high - low for low, high in owners)
    if most > group:
        raise ModelError(
            f"{num_heads} query heads ({num_kv_heads} groups of {group}) cannot be split over {num_ranks} ranks: "
            f"{most} ranks would share a group; use at most {num_heads} ranks"
        )
    query: list[Range] = []
    kv_heads: list[Range] = []
    for head, (low, high) in enumerate(owners):
        query += [(head * group + first, head * group + last) for first, last in split_features(group, high - low)]
        kv_heads += [(head, head + 1)] * (high - low)
    return HeadSplit(num_heads, num_kv_heads, tuple(query), tuple(kv_heads))


def _scaled(heads: Range, head_dim: int) -> Range:
    return heads[0] * head_dim, heads[1] * head_dim


def _merged(ranges: Iterable[Range]) -> Piece:
    """The same with neighbours joined."""
    joined: list[Range] = []
    for low, high in ranges:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        elif high > low:
            joined.append((low, high))
    return tuple(joined)
