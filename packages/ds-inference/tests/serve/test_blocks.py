"""The block manager against a plain model made of lists: no leak, no double free, LRU, copy on write."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ds_inference.errors import CapacityError
from ds_inference.serve.blocks import BlockManager

NUM_BLOCKS = 6
digests = st.integers(0, 7).map(lambda n: bytes([n]))


class Model(RuleBasedStateMachine):
    """`holds` has each hold that was taken and not given back; `content` what each block is known by, and `idle` the
    free blocks with content, longest idle first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, 4)
        self.holds: list[int] = []
        self.content: dict[int, bytes] = {}
        self.idle: list[int] = []

    def take_new(self, block: int) -> None:
        empty = NUM_BLOCKS - len(set(self.holds)) - len(self.idle)
        assert block not in self.holds
        if empty:
            assert block not in self.idle
        else:
            assert block == self.idle.pop(0)
            del self.content[block]

    @precondition(lambda self: len(set(self.holds)) < NUM_BLOCKS)
    @rule()
    def allocate(self) -> None:
        block = self.blocks.allocate()
        self.take_new(block)
        self.holds.append(block)

    @precondition(lambda self: len(set(self.holds)) == NUM_BLOCKS)
    @rule()
    def allocate_too_much(self) -> None:
        with pytest.raises(CapacityError, match="all 6 blocks"):
            self.blocks.allocate()

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def hold(self, block: int) -> None:
        if block in self.holds or block in self.idle:
            self.blocks.hold(block)
            self.holds.append(block)
            if block in self.idle:
                self.idle.remove(block)
        else:
            with pytest.raises(ValueError, match="is empty"):
                self.blocks.hold(block)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        given = data.draw(st.lists(st.sampled_from(range(NUM_BLOCKS)), max_size=4, unique=True))
        held = [block for block in given if block in self.holds]
        self.blocks.release(held)
        for block in reversed(held):
            self.holds.remove(block)
            if block not in self.holds and block in self.content:
                self.idle.append(block)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def release_what_is_free(self, block: int) -> None:
        if block not in self.holds:
            with pytest.raises(ValueError, match="free already"):
                self.blocks.release([block])

    @rule(block=st.integers(0, NUM_BLOCKS - 1), digest=digests)
    def register(self, block: int, digest: bytes) -> None:
        if block not in self.holds:
            with pytest.raises(ValueError, match="is free"):
                self.blocks.register(block, digest)
            return
        self.blocks.register(block, digest)
        if digest not in self.content.values():
            self.content[block] = digest

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def write(self, block: int) -> None:
        if block not in self.holds:
            with pytest.raises(ValueError, match="is free"):
                self.blocks.make_writable(block)
        elif self.holds.count(block) == 1:
            assert self.blocks.make_writable(block) == block
            self.content.pop(block, None)
        elif len(set(self.holds)) == NUM_BLOCKS:
            with pytest.raises(CapacityError):
                self.blocks.make_writable(block)
        else:
            copy = self.blocks.make_writable(block)
            self.take_new(copy)
            self.holds.remove(block)
            self.holds.append(copy)

    @rule()
    def clear(self) -> None:
        self.blocks.clear_cache()
        self.content.clear()
        self.idle.clear()

    @invariant()
    def same(self) -> None:
        counts = Counter(self.holds)
        assert [self.blocks.count(block) for block in range(NUM_BLOCKS)] == [counts[n] for n in range(NUM_BLOCKS)]
        assert self.blocks.num_free == NUM_BLOCKS - len(counts)
        assert self.blocks.num_cached == len(self.idle)
        known = {bytes([n]): self.blocks.find(bytes([n])) for n in range(8)}
        assert {digest: block for digest, block in known.items() if block is not None} == {
            digest: block for block, digest in self.content.items()
        }


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_prefix_outlives_what_follows_it() -> None:
    blocks = BlockManager(3, 2)
    table = [blocks.allocate() for _ in range(3)]
    for place, block in enumerate(table):
        blocks.register(block, bytes([place]))
    blocks.release(table)
    assert blocks.num_cached == 3
    assert [blocks.allocate() for _ in range(2)] == [table[2], table[1]]
    assert blocks.find(b"\0") == table[0] and blocks.find(b"\1") is None and blocks.num_evicted == 2


def test_without_prefix_caching_nothing_is_remembered() -> None:
    blocks = BlockManager(2, 2, prefix_caching=False)
    block = blocks.allocate()
    blocks.register(block, b"x")
    blocks.release([block])
    assert blocks.find(b"x") is None and blocks.num_cached == 0 and blocks.num_free == 2


def test_sizes() -> None:
    assert [BlockManager(1, 4).blocks_for(tokens) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="0 blocks of 4"):
        BlockManager(0, 4)
    with pytest.raises(ValueError, match="block 9; expected 0 to 1"):
        BlockManager(2, 4).count(9)
