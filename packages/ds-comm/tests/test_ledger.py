"""The ledger's formulas and summaries."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from ds_comm.ledger import STAMP_TEXT_NBYTES, Entry, Ledger


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64, 1024])
def test_wire_formulas(size: int) -> None:
    ledger = Ledger(size)
    numel = 6 * size
    expected = {
        "all_gather": 6 * (size - 1),
        "reduce_scatter": 6 * (size - 1),
        "all_to_all": 6 * (size - 1),
        "all_reduce": 12 * (size - 1),
        "all_reduce.max": 12 * (size - 1),
        "broadcast": numel if size > 1 else 0,
        "barrier": 0,
        "publish": 0,
    }
    for op in expected:
        ledger.add(op, torch.bfloat16, numel, "x")
    for op, wire in expected.items():
        assert ledger.wire_elements_of(op) == wire
    assert ledger.wire_elements == sum(expected.values())


def test_wire_of_sizes_that_do_not_divide() -> None:
    ledger = Ledger(3)
    ledger.add("all_reduce", torch.float32, 1, None)
    assert ledger.wire_elements == pytest.approx(4 / 3)


def test_counts_bytes_and_reset() -> None:
    ledger = Ledger(2)
    for _ in range(3):
        ledger.add("all_gather", torch.bfloat16, 10, "layers.0")
    ledger.add("all_gather", torch.float32, 10, "layers.0")
    ledger.add("barrier", None, 0, None)
    assert ledger.counts == {("all_gather", "layers.0"): 4, ("barrier", ""): 1}
    assert ledger.bytes == 3 * 20 + 40
    assert len(ledger.records) == 3
    summary = ledger.summary()
    assert summary["all_gather"]["count"] == 4
    assert summary["all_gather"]["wire_elements"] == 20
    assert summary["all_gather"]["wire_nbytes"] == 3 * 10 + 20
    assert summary["all_gather"]["bus_gbps"] == 0.0
    ledger.reset()
    assert ledger.counts == {} and ledger.bytes == 0 and ledger.wire_elements == 0 and ledger.records == ()


def test_times_only_when_asked_for() -> None:
    ledger = Ledger(2)
    entry = ledger.add("all_gather", torch.bfloat16, 1000, "x")
    with ledger.timed(entry):
        pass
    assert entry.seconds == 0.0 and ledger.wait_seconds == 0.0
    ledger.timing = True
    with ledger.timed(entry):
        pass
    assert entry.seconds > 0.0 and ledger.wait_seconds == entry.seconds
    row = ledger.summary()["all_gather"]
    assert row["bus_gbps"] == pytest.approx(row["wire_nbytes"] / entry.seconds / 1e9)


@pytest.mark.parametrize("by_label", [False, True])
def test_table(by_label: bool) -> None:
    ledger = Ledger(2)
    ledger.timing = True
    for label in ("layers.0", "layers.1"):
        with ledger.timed(ledger.add("all_gather", torch.bfloat16, 1_000_000, label)):
            pass
    output = io.StringIO()
    Console(file=output, width=120).print(ledger.table(by_label=by_label))
    text = output.getvalue()
    assert "all_gather" in text and "bus GB/s" in text
    assert ("layers.1" in text) == by_label
    assert ("4.000" in text) != by_label and ("2.000" in text)


def test_stamps_have_one_size_and_long_ones_still_differ() -> None:
    stamps = {Entry("reduce_scatter", torch.bfloat16, 1 << 40, "layer." * 30 + str(i), 2).stamp for i in range(5)} | {
        Entry("all_gather", None, 0, "é" * i, 2).stamp for i in range(100)
    }
    assert len(stamps) == 105
    assert {len(stamp) for stamp in stamps} == {STAMP_TEXT_NBYTES}


def test_description_names_op_label_and_shape() -> None:
    assert Entry("all_gather", torch.bfloat16, 12, "layers.7", 2).describe() == "all_gather layers.7 [12 x bfloat16]"
    assert Entry("barrier", None, 0, "", 2).describe() == "barrier"


def test_events_are_noted_only_while_somebody_wants_them() -> None:
    ledger = Ledger(2)
    ledger.events = noted = []
    entry = ledger.add("all_gather", torch.bfloat16, 8, "layers.0")
    with ledger.timed(entry):
        pass
    assert [found for found, _, _ in noted] == [entry, entry]
    (_, called, same), (_, begin, end) = noted
    assert called == same <= begin < end
    assert entry.seconds == 0.0 == ledger.wait_seconds  # timing is a matter of its own
    ledger.events = None
    with ledger.timed(ledger.add("all_gather", torch.bfloat16, 8, "layers.0")):
        pass
    assert len(noted) == 2
