"""The blocks of a paged cache: who holds which, which hold known text, and which may be used again. No tensors here.

A cache is `num_blocks` blocks of `block_size` tokens. A block is **held** by as many holders as its reference count
says; with none it is **free**: either empty, or **cached**: it still holds a full block of known tokens, findable by
the digest of all tokens up to its end, until the room is needed. Room is taken from empty blocks first, then from the
cached block that was let go longest ago.

Invariants: each block is exactly one of held, empty, cached; `num_free` is empty plus cached; a digest names one block
and a block has at most one; a shared block (count above 1) is never written: `make_writable` gives its holder a copy.
All operations are O(1) per block.
Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(arXiv:2309.06180).
"""

from __future__ import annotations

from collections.abc import Iterable

from ds_inference.errors import CapacityError

__all__ = ["BlockManager"]


class BlockManager:
    """Reference counts, prefix cache and eviction of `num_blocks` blocks, numbered from 0.

    `prefix_caching=False` remembers no content: free blocks are empty blocks.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, *, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens; expected at least 1 of each")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_evicted = 0
        """Cached blocks whose room was needed, since the start."""
        self._counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._by_digest: dict[bytes, int] = {}
        self._cached: dict[int, None] = {}  # in the order they were let go: a dict keeps it

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that still hold known tokens."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def count(self, block: int) -> int:
        """How many hold `block`."""
        return self._counts[self._checked(block)]

    def find(self, digest: bytes) -> int | None:
        """The block of this content, held or cached, if there is one. It is not the caller's before `hold`."""
        return self._by_digest.get(digest)

    def allocate(self) -> int:
        """A block of unknown content, held once. CapacityError when none is free."""
        if self._empty:
            block = self._empty.pop()
        elif self._cached:
            block = next(iter(self._cached))
            del self._cached[block]
            self._forget(block)
            self.num_evicted += 1
        else:
            raise CapacityError(f"all {self.num_blocks} blocks of the cache are held; release some first")
        self._counts[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder of a block that is held or cached."""
        if self._counts[self._checked(block)] == 0:
            if block not in self._cached:
                raise ValueError(f"block {block} is empty: nobody holds it and it has no content to share")
            del self._cached[block]
        self._counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less of each. The last of `blocks` is let go first, so that a prefix outlives what follows it."""
        for block in reversed(list(blocks)):
            if self._counts[self._checked(block)] == 0:
                raise ValueError(f"block {block} is free already; it was released once too often")
            self._counts[block] -= 1
            if self._counts[block] == 0:
                if self._digests[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """A held block is full and holds the content that `digest` names: from now on `find` gives it.

        Of two blocks of one content the first stays the known one.
        """
        if self._counts[self._checked(block)] == 0:
            raise ValueError(f"block {block} is free; only what is held can be registered")
        if (
            self.prefix_caching
            and self._by_digest.setdefault(digest, block) == block
            and self._digests[block] != digest
        ):
            self._forget(block)
            self._digests[block] = digest
            self._by_digest[digest] = block

    def make_writable(self, block: int) -> int:
        """The block to write to for one holder of `block`: itself, or, when it is shared, a new one in its place.

        In the second case the caller's hold has moved, and it must copy the content over before it writes.
        A block that is written loses its digest. CapacityError when a copy is needed and no block is free.
        """
        if self._counts[self._checked(block)] == 0:
            raise ValueError(f"block {block} is free; only what is held can be written")
        if self._counts[block] == 1:
            self._forget(block)
            return block
        copy = self.allocate()
        self._counts[block] -= 1
        return copy

    def clear_cache(self) -> None:
        """Forget all content (the weights have changed, say); blocks that are held stay held."""
        self._empty.extend(self._cached)
        self._cached.clear()
        self._by_digest.clear()
        self._digests = [None] * self.num_blocks

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[block] = None

    def _checked(self, block: int) -> int:
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block}; expected 0 to {self.num_blocks - 1}")
        return block
