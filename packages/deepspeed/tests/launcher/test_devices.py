"""Slots, cores and their sharing."""

from __future__ import annotations

import pytest

from deepspeed.launcher import devices as module
from deepspeed.launcher.devices import (
    Devices,
    local_devices,
    parse_core_list,
    split_cores,
    threads_per_rank,
    visible_slots,
)


def test_cpu_slots_are_cores(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(module, "usable_cores", lambda: 6)
    found = local_devices()
    assert (found.kind, found.count, found.visible_variable) == ("cpu", 6, None)
    assert threads_per_rank(2) == 3
    assert threads_per_rank(7) == 1


def test_visibility_variable():
    cuda = Devices("cuda", 4)
    assert cuda.visible_variable == "CUDA_VISIBLE_DEVICES"
    assert cuda.spell([1, 3]) == "1,3"
    assert Devices("cuda", 2, ("GPU-a", "GPU-b")).spell([1]) == "GPU-b"


def test_visible_slots(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_slots(Devices("cuda", 2)) == [2, 5]
    assert visible_slots(Devices("cuda", 2, ("GPU-a", "GPU-b"))) is None
    assert visible_slots(Devices("cpu", 2)) is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_slots(Devices("cuda", 2)) is None


def test_core_list():
    assert parse_core_list("1,3-5, 9") == [1, 3, 4, 5, 9]
    for bad in ("", "a", "3-", "5-3", "1,1", "1-3,2"):
        with pytest.raises(ValueError, match="bind_core_list"):
            parse_core_list(bad)


def test_cores_are_shared_equally(monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    assert split_cores(2, "1,3-6") == [([1, 3], 2), ([4, 5], 2)]
    # Hyper-threads: the sibling of core n is n + 4; core 8 has none. Siblings stay together.
    monkeypatch.setattr(module, "_physical_cores", lambda threads: [[0, 4], [1, 5], [2, 6], [3, 7], [8]])
    assert split_cores(2) == [([0, 1, 4, 5], 2), ([2, 3, 6, 7], 2)]
    with pytest.raises(ValueError, match="cannot be shared by 6 ranks"):
        split_cores(6)
    with pytest.raises(ValueError, match="core 12 is not among"):
        split_cores(1, "12")


def test_control_group_quota_caps_the_cores(monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(module, "_cgroup_quota", lambda: 2)
    assert module.usable_cores() == 2
    monkeypatch.setattr(module, "_cgroup_quota", lambda: None)
    assert module.usable_cores() == 64
