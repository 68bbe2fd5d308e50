"""The accelerator interface is complete, and right on a CPU."""

from __future__ import annotations

import pytest
import torch

from deepspeed.accelerator import (
    DeepSpeedAccelerator,
    get_accelerator,
    is_current_accelerator_supported,
    set_accelerator,
)
from deepspeed.accelerator import real_accelerator as module
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

INTERFACE = [
    "is_synchronized_device",
    "use_host_timers",
    "resolves_data_dependency",
    "handles_memory_backpressure",
    "device_name",
    "device",
    "set_device",
    "current_device",
    "current_device_name",
    "device_count",
    "synchronize",
    "random",
    "set_rng_state",
    "get_rng_state",
    "manual_seed",
    "manual_seed_all",
    "initial_seed",
    "default_generator",
    "Stream",
    "stream",
    "current_stream",
    "default_stream",
    "Event",
    "empty_cache",
    "memory_allocated",
    "max_memory_allocated",
    "reset_max_memory_allocated",
    "memory_cached",
    "max_memory_cached",
    "reset_max_memory_cached",
    "memory_stats",
    "reset_peak_memory_stats",
    "memory_reserved",
    "max_memory_reserved",
    "total_memory",
    "available_memory",
    "amp",
    "is_available",
    "range_push",
    "range_pop",
    "lazy_call",
    "communication_backend_name",
    "is_triton_supported",
    "create_graph",
    "capture_to_graph",
    "replay_graph",
    "BFloat16Tensor",
    "ByteTensor",
    "DoubleTensor",
    "FloatTensor",
    "HalfTensor",
    "IntTensor",
    "LongTensor",
    "pin_memory",
    "is_pinned",
    "unpin_memory",
    "on_accelerator",
    "op_builder_dir",
    "create_op_builder",
    "get_op_builder",
    "build_extension",
    "export_envs",
    "visible_devices_envs",
    "set_visible_devices_envs",
    "get_compile_backend",
    "set_compile_backend",
    "is_bf16_supported",
    "is_fp16_supported",
    "supported_dtypes",
    "communication_backend_version",
]


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_chosen", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.mark.parametrize("kind", [CPU_Accelerator, CUDA_Accelerator])
def test_interface_is_complete(kind: type[DeepSpeedAccelerator]) -> None:
    assert [name for name in INTERFACE if not hasattr(kind, name)] == []


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert type(get_accelerator()) is CUDA_Accelerator and get_accelerator().communication_backend_name() == "nccl"
    assert get_accelerator() is get_accelerator()
    monkeypatch.setattr(module, "_chosen", None)
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")
    with pytest.raises(ValueError, match="DS_ACCELERATOR is 'abacus'"):
        get_accelerator()


def test_setting_one() -> None:
    mine = CPU_Accelerator()
    set_accelerator(mine)
    assert get_accelerator() is mine and is_current_accelerator_supported()
    with pytest.raises(TypeError, match="str"):
        set_accelerator("cpu")  # type: ignore[arg-type]


def test_names_take_a_string_rank() -> None:
    assert CPU_Accelerator().device_name("0") == "cpu" and CPU_Accelerator().current_device_name() == "cpu"
    assert CUDA_Accelerator().device_name("1") == "cuda:1" and CUDA_Accelerator().device_name() == "cuda"


def test_cpu_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = CPU_Accelerator()
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert (cpu.current_device(), cpu.device_count(), cpu.device()) == (3, 4, None)
    assert cpu.is_available() and cpu.is_synchronized_device() and cpu.use_host_timers()
    assert cpu.supported_dtypes() == [torch.float, torch.half, torch.bfloat16]
    assert 0 < cpu.available_memory() < cpu.total_memory()
    assert cpu.memory_allocated() == cpu.max_memory_reserved() == 0 and cpu.memory_stats() == {}
    assert cpu.communication_backend_name() == "gloo" and not cpu.is_triton_supported()
    with cpu.stream(cpu.current_stream()), cpu.capture_to_graph(cpu.create_graph()):
        cpu.range_push("x")
        cpu.range_pop()
    cpu.synchronize()
    cpu.empty_cache()
    cpu.reset_peak_memory_stats()
    tensor = torch.ones(2)
    assert cpu.pin_memory(tensor) is tensor and cpu.is_pinned(tensor) and cpu.on_accelerator(tensor)
    assert cpu.lazy_call(lambda: 5) == 5
    assert cpu.get_op_builder("CPUAdamBuilder") is None and cpu.create_op_builder("CPUAdamBuilder") is None


def test_cpu_random_states() -> None:
    cpu = CPU_Accelerator()
    cpu.manual_seed(3)
    state = cpu.get_rng_state()
    first = torch.rand(2)
    cpu.set_rng_state(state)
    assert torch.equal(first, torch.rand(2))
    cpu.manual_seed_all(3)
    assert torch.equal(first, torch.rand(2)) and cpu.initial_seed() == 3
    assert cpu.default_generator() is torch.default_generator


def test_constructors_of_typed_tensors() -> None:
    cpu = CPU_Accelerator()
    assert cpu.HalfTensor([1.0, 2.0]).dtype == torch.half and cpu.LongTensor(2, 3).shape == (2, 3)
    assert cpu.BFloat16Tensor().numel() == 0 and cpu.DoubleTensor([1]).tolist() == [1.0]


def test_environment_for_child_processes() -> None:
    env: dict[str, str] = {}
    CUDA_Accelerator().set_visible_devices_envs(env, [2, 3])
    assert env == {"CUDA_VISIBLE_DEVICES": "2,3"}


def test_compile_backend() -> None:
    cpu = CPU_Accelerator()
    assert cpu.get_compile_backend() == "inductor"
    cpu.set_compile_backend("eager")
    assert cpu.get_compile_backend() == "eager"
    with pytest.raises(ValueError, match="'nonsense'"):
        cpu.set_compile_backend("nonsense")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_facts() -> None:
    cuda = CUDA_Accelerator()
    tensor = cuda.FloatTensor(1024)
    assert cuda.on_accelerator(tensor) and cuda.memory_allocated() >= 4096 and cuda.total_memory() > 2**30
    event = cuda.Event(enable_timing=True)
    with cuda.stream(cuda.Stream()):
        event.record()
    cuda.synchronize()
    assert cuda.pin_memory(torch.ones(2)).is_pinned()
