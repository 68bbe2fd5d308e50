"""The device layer on the CPU (real memory figures), and with a made-up accelerator in torch's place."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from ds_comm import device

MIB = 2**20


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No accelerator, also on a machine that has one."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Four devices of type xpu; the namespace records the calls."""
    fake = SimpleNamespace(index=1, synchronized=0, emptied=0, peak_reset=0)

    def count(field: str) -> None:
        setattr(fake, field, getattr(fake, field) + 1)

    replacements = {
        "current_accelerator": lambda check_available=False: torch.device("xpu"),
        "device_count": lambda: 4,
        "current_device_index": lambda: fake.index,
        "set_device_index": lambda index: setattr(fake, "index", index),
        "synchronize": lambda: count("synchronized"),
        "empty_cache": lambda: count("emptied"),
        "memory_allocated": lambda: 10,
        "max_memory_allocated": lambda: 20,
        "reset_peak_memory_stats": lambda: count("peak_reset"),
        "get_memory_info": lambda: (30, 40),
        "get_device_capability": lambda: {"supported_dtypes": {torch.float32, torch.bfloat16}},
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.accelerator, name, replacement)
    return fake


@pytest.mark.usefixtures("cpu")
def test_the_cpu_is_one_device() -> None:
    assert device.device_type() == "cpu"
    assert device.current_device() == torch.device("cpu")
    assert device.device_count() == 1
    assert device.communication_backend() == "gloo"
    assert device.is_bf16_supported()
    assert device.is_fp16_supported()
    device.set_device(3)  # a launcher's LOCAL_RANK: nothing to choose
    device.synchronize()
    device.empty_cache()
    assert device.current_device() == torch.device("cpu")


@pytest.mark.usefixtures("cpu")
@pytest.mark.skipif(sys.platform != "linux", reason="figures of /proc")
def test_memory_of_the_process() -> None:
    before = device.memory_allocated()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    held = device.memory_allocated()
    assert 60 * MIB < held - before < 80 * MIB
    assert device.max_memory_allocated() >= held
    del block
    assert device.memory_allocated() < held - 60 * MIB
    if device.reset_peak_memory():
        assert device.max_memory_allocated() < held - 60 * MIB
    assert device.total_memory() > held


@pytest.mark.usefixtures("cpu")
def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    missing = type(device._STATUS)(str(tmp_path)) / "missing" / "file"
    monkeypatch.setattr(device, "_STATUS", missing)
    monkeypatch.setattr(device, "_CLEAR_REFS", missing)
    assert device.memory_allocated() == device.max_memory_allocated() > 10 * MIB
    assert device.reset_peak_memory() is False


def test_an_accelerator(accelerator: SimpleNamespace) -> None:
    assert device.device_type() == "xpu"
    assert device.current_device() == torch.device("xpu", 1)
    assert device.device_count() == 4
    device.set_device(3)
    assert device.current_device() == torch.device("xpu", 3)
    device.synchronize()
    device.empty_cache()
    assert device.reset_peak_memory()
    assert (accelerator.synchronized, accelerator.emptied, accelerator.peak_reset) == (1, 1, 1)
    assert (device.memory_allocated(), device.max_memory_allocated(), device.total_memory()) == (10, 20, 40)
    assert device.communication_backend() == "xccl"
    assert device.is_bf16_supported()
    assert not device.is_fp16_supported()


@pytest.mark.parametrize("index", [-1, 4])
def test_a_device_that_is_not_there(accelerator: SimpleNamespace, index: int) -> None:
    with pytest.raises(ValueError, match=rf"set_device\({index}\): this process sees 4 xpu devices \(0 to 3\)"):
        device.set_device(index)
    assert accelerator.index == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu() -> None:
    device.set_device(0)
    assert device.current_device() == torch.device("cuda", 0)
    assert device.communication_backend() == "nccl"
    device.reset_peak_memory()
    before = device.memory_allocated()
    block = torch.ones(64 * MIB, dtype=torch.uint8, device=device.current_device())
    device.synchronize()
    assert device.memory_allocated() - before == block.nbytes
    assert device.max_memory_allocated() >= before + block.nbytes
    assert device.total_memory() > 2**30
    assert device.is_fp16_supported()
