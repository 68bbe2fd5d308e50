"""The hostfile, the filter and the world info."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.launcher.hostfile import (
    decode_world_info,
    encode_world_info,
    fetch_hostfile,
    limit_pool,
    parse_hostfile,
    parse_inclusion_exclusion,
    parse_resource_filter,
)

HOSTS = {"worker-0": 4, "worker-1": 4, "worker-2": 2}
names = st.from_regex(r"\A[a-z][a-z0-9.-]{0,8}\Z")


def test_lines_comments_and_blanks():
    lines = ["# all hosts", "", "worker-1 slots=2", "  worker-0   slots = 16  ", "\t"]
    assert parse_hostfile(lines) == {"worker-1": 2, "worker-0": 16}
    assert list(parse_hostfile(lines)) == ["worker-1", "worker-0"]  # the order of the file


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["worker-0 slots=x"], "line 1.*worker-0 slots=x"),
        (["worker-0 slot=4"], "not of the form"),
        (["worker-0"], "not of the form"),
        (["worker-0 slots=4 # eight"], "not of the form"),
        (["worker-0 slots=4", "worker-0 slots=2"], "line 2.*appears twice"),
        ([], "no hosts"),
        (["# none", ""], "no hosts"),
    ],
)
def test_bad_hostfile_names_the_line(lines, what):
    with pytest.raises(ValueError, match=what):
        parse_hostfile(lines)


def test_fetch_hostfile(tmp_path: Path):
    assert fetch_hostfile(tmp_path / "none") is None
    (tmp_path / "hosts").write_text("a slots=1\n")
    assert fetch_hostfile(tmp_path / "hosts") == {"a": 1}
    (tmp_path / "hosts").write_text("")
    with pytest.raises(ValueError, match=r"hosts: no hosts"):
        fetch_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("", "", {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3], "worker-2": [0, 1]}),
        ("worker-1", "", {"worker-1": [0, 1, 2, 3]}),  # a bare host is all of its slots
        (
            "worker-2:1@worker-0:2,0",
            "",
            {"worker-0": [0, 2], "worker-2": [1]},
        ),  # the hostfile's order, not the filter's
        ("", "worker-1", {"worker-0": [0, 1, 2, 3], "worker-2": [0, 1]}),
        ("", "worker-1:0,3@worker-2", {"worker-0": [0, 1, 2, 3], "worker-1": [1, 2]}),
        ("", "worker-2:0,1", {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3]}),  # emptied hosts drop out
    ],
)
def test_filters(include, exclude, expected):
    result = parse_inclusion_exclusion(HOSTS, include, exclude)
    assert result == expected
    assert list(result) == list(expected)


@pytest.mark.parametrize(
    ("include", "exclude", "what"),
    [
        ("worker-0", "worker-1", "exclude each other"),
        ("worker-9", "", "unknown host 'worker-9'.*worker-0, worker-1"),
        ("", "worker-9:0", "unknown host 'worker-9'"),
        ("worker-2:2", "", "'worker-2' has no slot 2; its slots: 0,1"),
        ("", "worker-2:7", "no slot 7"),
        ("worker-0:a", "", "must be numbers"),
        ("worker-0:", "", "must be numbers"),
        ("@worker-0", "", "empty host name"),
        ("worker-0:0@worker-0:1", "", "appears twice"),
        ("", "worker-0@worker-1@worker-2", "no slot to run on"),
    ],
)
def test_bad_filters(include, exclude, what):
    with pytest.raises(ValueError, match=what):
        parse_inclusion_exclusion(HOSTS, include, exclude)


def test_filter_of_slot_lists_keeps_their_ids():
    assert parse_resource_filter({"a": [3, 5, 7]}, exclude_str="a:5") == {"a": [3, 7]}


def test_limits():
    pool = parse_inclusion_exclusion(HOSTS, "", "")
    assert limit_pool(pool, num_nodes=2) == {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3]}
    assert limit_pool(pool, num_slots=3) == {host: [0, 1, 2] for host in HOSTS}
    assert limit_pool(pool, 1, 1) == {"worker-0": [0]}
    for bad in ({"num_nodes": 4}, {"num_nodes": 0}, {"num_slots": 0}, {"num_slots": -2}):
        with pytest.raises(ValueError, match="expected"):
            limit_pool(pool, **bad)


@given(
    st.dictionaries(names, st.lists(st.integers(0, 63), min_size=1, max_size=8, unique=True), min_size=1, max_size=6)
)
def test_world_info_round_trip(pool):
    text = encode_world_info(pool)
    assert decode_world_info(text) == pool
    assert list(decode_world_info(text)) == list(pool)
    assert not set(text) & set(" '\"$\\%;&|<>")  # passes through any shell as it is


@pytest.mark.parametrize("text", ["", "!!!", "e30", "bm90IGpzb24=", "WzFd"])
def test_bad_world_info(text):
    with pytest.raises(ValueError, match="world_info"):
        decode_world_info(text)


@given(st.dictionaries(names, st.integers(1, 8), min_size=1, max_size=5), st.data())
def test_include_and_exclude_are_complements(hosts, data):
    slots = [(host, slot) for host, count in hosts.items() for slot in range(count)]
    chosen = data.draw(st.lists(st.sampled_from(slots), min_size=1, unique=True))
    text = "@".join(f"{host}:{','.join(str(s) for h, s in chosen if h == host)}" for host in dict(chosen))
    included = parse_inclusion_exclusion(hosts, text, "")
    assert {(h, s) for h, ids in included.items() for s in ids} == set(chosen)
    if len(chosen) < len(slots):
        rest = parse_inclusion_exclusion(hosts, "", text)
        assert {(h, s) for h, ids in rest.items() for s in ids} == set(slots) - set(chosen)
