"""The always-on ledger: what a group has communicated.

Vocabulary
  entry     everything counted for one (op, dtype, numel, label); also carries the text of its stamp.
  numel     elements of the whole message: the input for all_reduce and reduce_scatter, the output for all_gather.
  wire      elements one rank must send (equally: receive) on a ring: n(N-1)/N for all_gather, reduce_scatter and
            all_to_all, 2n(N-1)/N for all_reduce, n for broadcast and the like, 0 for a barrier. A formula, not a
            measurement: it does not depend on the transport, so the fake world and the real one agree.
  seconds   only with ``timing = True``: time the caller spent inside the call and in waiting for it.

  events    only while a list is there: every call as it is entered, and every timed stretch, for a trace.

Counting is one dictionary look-up and one addition; it never synchronises and never looks at data.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.table import Table

# factor of n(N-1)/N per rank
_RING = {
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "gather": 1,
    "scatter": 1,
    "all_reduce": 2,
}
_FULL = frozenset({"broadcast", "reduce", "send", "recv"})

STAMP_TEXT_NBYTES = 104
"""Bytes of a stamp's text in its fixed-size record; longer texts are cut and end in a checksum of the whole."""


def wire_numerator(op: str, numel: int, size: int) -> int:
    """Elements on the wire per rank, times the group size (an integer for every op and size)."""
    if size == 1:
        return 0
    kind = op.partition(".")[0]  # "all_reduce.max" is an all_reduce
    if kind in _RING:
        return _RING[kind] * numel * (size - 1)
    return numel * size if kind in _FULL else 0


class Entry:
    """Counts for one (op, dtype, numel, label)."""

    __slots__ = ("count", "dtype", "label", "ledger", "nbytes", "numel", "op", "seconds", "stamp", "wire")

    def __init__(self, op: str, dtype: torch.dtype | None, numel: int, label: str, size: int) -> None:
        self.op, self.dtype, self.numel, self.label = op, dtype, numel, label
        self.count = 0
        self.seconds = 0.0
        self.nbytes = numel * (dtype.itemsize if dtype is not None else 1)
        self.wire = wire_numerator(op, numel, size)
        self.stamp = self._encode()
        self.ledger: Ledger | None = None

    def timed(self) -> AbstractContextManager[None]:
        """``Ledger.timed`` of the ledger this entry belongs to."""
        return self.ledger.timed(self) if self.ledger is not None else nullcontext()

    def describe(self) -> str:
        """``reduce_scatter layers.9 [1024 x bfloat16]``: how errors and tables name this call."""
        return describe_stamp(self.stamp)

    def _encode(self) -> bytes:
        shape = f"{self.numel} x {str(self.dtype).removeprefix('torch.')}" if self.dtype is not None else ""
        text = f"{self.op}\x1f{self.label}\x1f{shape}".encode()
        if len(text) > STAMP_TEXT_NBYTES:
            # the op stays whole, the label keeps its head, and two texts that differ in the cut part still differ
            tail = f"...{zlib.crc32(text):08x}\x1f{shape}".encode()
            head = text[: STAMP_TEXT_NBYTES - len(tail)].decode(errors="ignore").encode()
            text = head + tail
        return text.ljust(STAMP_TEXT_NBYTES, b"\0")


Event = tuple[Entry, float, float]
"""An entry with the ``perf_counter`` at which a call was entered (twice), or a stretch of it began and ended."""


def describe_stamp(stamp: bytes) -> str:
    """Readable form of a stamp's text."""
    op, label, shape = (*stamp.rstrip(b"\0").decode(errors="replace").split("\x1f"), "", "")[:3]
    return " ".join(part for part in (op, label, f"[{shape}]" if shape else "") if part)


class Ledger:
    """Counts of one communicator. ``size`` is the group size that the wire formulas use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.timing = False
        self.wait_seconds = 0.0
        self.events: list[Event] | None = None
        """Where calls and stretches are noted while it is a list."""
        self._entries: dict[tuple[str, torch.dtype | None, int, str], Entry] = {}

    def add(self, op: str, dtype: torch.dtype | None, numel: int, label: str | None) -> Entry:
        """Count one call; numel is that of the whole message. Returns its entry, which holds the stamp."""
        entry = self.entry(op, dtype, numel, label)
        entry.count += 1
        if self.events is not None:
            now = perf_counter()
            self.events.append((entry, now, now))
        return entry

    def entry(self, op: str, dtype: torch.dtype | None, numel: int, label: str | None) -> Entry:
        """The entry of such a call, without counting one."""
        key = (op, dtype, numel, label or "")
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(op, dtype, numel, label or "", self.size)
            entry.ledger = self
        return entry

    @contextmanager
    def timed(self, entry: Entry | None) -> Iterator[None]:
        """Add the time inside to ``entry`` and to ``wait_seconds``; free when nobody times."""
        if not self.timing and self.events is None:
            yield
            return
        start = perf_counter()
        try:
            yield
        finally:
            stop = perf_counter()
            if self.timing:
                self.wait_seconds += stop - start
                if entry is not None:
                    entry.seconds += stop - start
            if self.events is not None and entry is not None:
                self.events.append((entry, start, stop))

    @property
    def records(self) -> tuple[Entry, ...]:
        """Entries that have counted anything, in order of first use."""
        return tuple(entry for entry in self._entries.values() if entry.count)

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """Calls by (op, label)."""
        totals: dict[tuple[str, str], int] = {}
        for entry in self.records:
            key = (entry.op, entry.label)
            totals[key] = totals.get(key, 0) + entry.count
        return totals

    @property
    def bytes(self) -> int:
        """Bytes of all messages, each counted whole."""
        return sum(entry.count * entry.nbytes for entry in self.records)

    @property
    def wire_elements(self) -> float:
        """Elements per rank on the wire by the ring formulas; a whole number wherever the formulas give one."""
        numerator = sum(entry.count * entry.wire for entry in self.records)
        return numerator // self.size if numerator % self.size == 0 else numerator / self.size

    def wire_elements_of(self, op: str) -> float:
        """``wire_elements`` of one op alone."""
        numerator = sum(entry.count * entry.wire for entry in self.records if entry.op == op)
        return numerator // self.size if numerator % self.size == 0 else numerator / self.size

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per op: ``count, nbytes, wire_elements, wire_nbytes, seconds, bus_gbps`` (the last 0.0 unless timed).

        Bus bandwidth is wire bytes per rank over seconds, in units of 1e9 bytes per second: it does not depend on the
        group size, so it can be held against the hardware's bandwidth.
        """
        rows: dict[str, dict[str, Any]] = {}
        wire_nbytes: dict[str, int] = {}
        for entry in self.records:
            row = rows.setdefault(entry.op, {"count": 0, "nbytes": 0, "seconds": 0.0})
            row["count"] += entry.count
            row["nbytes"] += entry.count * entry.nbytes
            row["seconds"] += entry.seconds
            itemsize = entry.dtype.itemsize if entry.dtype is not None else 1
            wire_nbytes[entry.op] = wire_nbytes.get(entry.op, 0) + entry.count * entry.wire * itemsize
        for op, row in rows.items():
            row["wire_elements"] = self.wire_elements_of(op)
            row["wire_nbytes"] = wire_nbytes[op] / self.size
            row["bus_gbps"] = row["wire_nbytes"] / row["seconds"] / 1e9 if row["seconds"] > 0 else 0.0
        return rows

    def table(self, *, by_label: bool = False) -> Table:
        """A rich table of the summary, one line per op, or per (op, label) with ``by_label``."""
        from rich.table import Table  # here, so that importing the package stays cheap

        table = Table(title=f"communication of one rank of {self.size}")
        for name in ("op", "label") if by_label else ("op",):
            table.add_column(name)
        for name in ("calls", "MB", "wire MB"):
            table.add_column(name, justify="right")
        if self.timing:
            table.add_column("seconds", justify="right")
            table.add_column("bus GB/s", justify="right")
        for keys, view in self._groups(by_label):
            for row in view.summary().values():
                cells = [f"{row['count']:,}", f"{row['nbytes'] / 1e6:,.3f}", f"{row['wire_nbytes'] / 1e6:,.3f}"]
                if self.timing:
                    cells += [f"{row['seconds']:.3f}", f"{row['bus_gbps']:.2f}"]
                table.add_row(*keys, *cells)
        return table

    def _groups(self, by_label: bool) -> Iterator[tuple[tuple[str, ...], Ledger]]:
        """Sub-ledgers that share this one's entries, one per table line."""
        views: dict[tuple[str, ...], Ledger] = {}
        for key, entry in self._entries.items():
            if entry.count:
                line = (entry.op, entry.label) if by_label else (entry.op,)
                views.setdefault(line, Ledger(self.size))._entries[key] = entry
        yield from views.items()

    def reset(self) -> None:
        """Forget all counts and times (stamps keep their numbers: they belong to the transport)."""
        for entry in self._entries.values():
            entry.count = 0
            entry.seconds = 0.0
        self.wait_seconds = 0.0
