"""Activation checkpointing: gradients equal those without it, to the bit, under every setting."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
import ds_comm
from deepspeed.runtime.activation_checkpointing import checkpointing, offload_activations, storage
from ds_comm.testing import run_ranks


@pytest.fixture(autouse=True)
def fresh_settings() -> Iterator[None]:
    yield
    checkpointing.reset()
    checkpointing.get_cuda_rng_tracker().reset()


class Block(nn.Module):
    """Dropout from the default state and from the model-parallel one, and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight.requires_grad_(False)
        self.calls = 0

    def forward(self, x: torch.Tensor, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        x = nn.functional.dropout(self.first(x), 0.5)
        with checkpointing.get_cuda_rng_tracker().fork():
            x = nn.functional.dropout(x, 0.3)
        x = self.second(x).tanh() * scale
        return x if mask is None else x.masked_fill(mask, 0)


def gradients(run: Any, input_requires_grad: bool = True) -> tuple[list[torch.Tensor], int]:
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(3, 6, requires_grad=input_requires_grad)
    checkpointing.model_parallel_cuda_manual_seed(7)
    out = run(block, x, 2.0, torch.arange(6) > 4)
    later = torch.rand(3)  # the states go on as if nothing had been recomputed
    with checkpointing.get_cuda_rng_tracker().fork():
        later = later + torch.rand(3)
    out.square().sum().backward()
    found = [out.detach(), later, *(p.grad for p in block.parameters() if p.grad is not None)]
    return [*found, x.grad] if x.grad is not None else found, block.calls


def assert_same(run: Any, **kwargs: Any) -> None:
    expected, once = gradients(lambda block, *args: block(*args), **kwargs)
    found, twice = gradients(run, **kwargs)
    assert (once, twice) == (1, 2)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"checkpoint_in_cpu": True}, {"partition_activations": True}, {"synchronize": True, "profile": True}],
)
def test_gradients_and_random_numbers_are_those_of_a_plain_run(reentrant: bool, settings: dict[str, bool]) -> None:
    if settings:
        deepspeed.checkpointing.configure(None, **settings)
    assert_same(lambda block, *args: checkpointing.checkpoint(block, *args, use_reentrant=reentrant))


def test_works_without_an_input_that_requires_grad() -> None:
    assert_same(checkpointing.non_reentrant_checkpoint, input_requires_grad=False)


def test_checkpoint_function_collects_outputs() -> None:
    outputs: list[torch.Tensor] = []

    def run(block: Block, *args: Any) -> torch.Tensor:
        out: torch.Tensor = checkpointing.CheckpointFunction.apply(block, outputs, *args)
        return out

    assert_same(run)
    assert len(outputs) == 1


def test_cpu_checkpointing_offloads_the_arguments_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[tuple[int, ...]] = []
    real = storage.ArgumentStorage.pack

    def pack(self: storage.ArgumentStorage, tensor: torch.Tensor) -> Any:
        kept = real(self, tensor)
        packed.append(tuple(tensor.shape))
        assert kept.data.device.type == "cpu"
        return kept

    monkeypatch.setattr(storage.ArgumentStorage, "pack", pack)
    deepspeed.checkpointing.configure(None, checkpoint_in_cpu=True)
    assert_same(checkpointing.checkpoint)
    assert sorted(packed) == [(3, 6), (6,)]  # the input and the mask


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_checkpointing_frees_device_memory() -> None:
    deepspeed.checkpointing.configure(None, checkpoint_in_cpu=True)
    kept = storage.ArgumentStorage(True).pack(torch.ones(4, device="cuda"))
    assert kept.data.is_pinned()
    assert storage.ArgumentStorage(True).unpack(kept).device.type == "cuda"


class Mpu:
    """Every rank of the world is one model-parallel group."""

    def get_model_parallel_group(self) -> Any:
        return ds_comm.get_world_group()

    def get_model_parallel_world_size(self) -> int:
        return ds_comm.get_world_size()

    def get_model_parallel_rank(self) -> int:
        return ds_comm.get_rank()


def partitioned() -> tuple[bool, int, bool]:
    checkpointing.configure(Mpu(), partition_activations=True, checkpoint_in_cpu=True)
    sizes = []
    real = storage.ArgumentStorage.pack

    def pack(self: storage.ArgumentStorage, tensor: torch.Tensor) -> Any:
        kept = real(self, tensor)
        sizes.append(kept.data.numel())
        return kept

    storage.ArgumentStorage.pack = pack  # type: ignore[method-assign]
    torch.manual_seed(3)
    layer = nn.Linear(5, 5)
    x = torch.randn(3, 5, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    found = torch.autograd.grad(checkpointing.checkpoint(layer, x).square().sum(), [x, *layer.parameters()])
    checkpointing.model_parallel_cuda_manual_seed(11)
    with checkpointing.get_cuda_rng_tracker().fork():
        drawn = torch.rand(1).item()
    storage.ArgumentStorage.pack = real  # type: ignore[method-assign]
    checkpointing.reset()
    generator = torch.Generator().manual_seed(11 + 2718 + ds_comm.get_rank())
    seeded = drawn == torch.rand(1, generator=generator).item()
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), sizes[0], seeded


def test_partitioned_activations_keep_a_part_on_each_rank() -> None:
    assert run_ranks(partitioned, 2) == [(True, 8, True), (True, 8, True)]  # 15 elements, padded to 16


def test_configure_reads_the_section_and_arguments_override_it(tmp_path: Path) -> None:
    section = {"partition_activations": True, "number_checkpoints": 3, "cpu_checkpointing": True}
    assert not checkpointing.is_configured()
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"activation_checkpointing": section}))
    as_object = SimpleNamespace(activation_checkpointing=SimpleNamespace(**section))
    for config in (str(path), {"activation_checkpointing": section}, as_object):
        checkpointing.configure(mpu_=None, deepspeed_config=config, checkpoint_in_cpu=False, profile=None)
        chosen = checkpointing._settings
        assert chosen == checkpointing.Settings(partition_activations=True, num_checkpoints=3)
    assert checkpointing.is_configured()
    checkpointing.reset()
    assert not checkpointing.is_configured()


def test_contiguous_needs_partition() -> None:
    with pytest.raises(ValueError, match="contiguous_memory_optimization"):
        checkpointing.configure(None, contiguous_checkpointing=True)
    assert not checkpointing.is_configured()


def test_switches_of_one_setting() -> None:
    checkpointing.partition_activations_in_checkpoint(True)
    checkpointing.set_num_layers(4)
    assert checkpointing._settings == checkpointing.Settings(partition_activations=True, num_checkpoints=4)


def test_tracker_refuses_duplicates_and_unknown_names() -> None:
    tracker = checkpointing.CudaRNGStatesTracker()
    before = torch.get_rng_state()
    tracker.add("a", 1)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="seed 1 is already used"):
        tracker.add("b", 1)
    with pytest.raises(ValueError, match="'a' already exists"):
        tracker.add("a", 2)
    with pytest.raises(KeyError, match="'c' does not exist"), tracker.fork("c"):
        pass


def test_reconfiguring_the_tensor_parallel_seed_leaves_the_default_state() -> None:
    checkpointing.model_parallel_cuda_manual_seed(1)
    before = torch.get_rng_state()
    checkpointing.model_parallel_reconfigure_tp_seed(5)
    assert torch.equal(before, torch.get_rng_state())
    with checkpointing.get_cuda_rng_tracker().fork():
        drawn = torch.rand(1)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(5 + 2718)))


class SelfMade(nn.Module):
    """Checkpoints itself, as layers of transformers do."""

    gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpointing.checkpoint(self.inner, x)
        return out


def test_inputs_of_layers_that_checkpoint_themselves_are_offloaded() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(SelfMade(), SelfMade(), nn.Linear(16, 1))
    x = torch.randn(20, 16)
    net(x).sum().backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    offload = offload_activations.get_checkpoint_hidden_states_offloading_ctx_manager(min_offload_bytes=1024)
    extra = torch.randn(20, 20, requires_grad=True)
    with offload:
        loss = net(x).sum()
        offload.mark(extra)
        loss = loss + extra.square().sum()
    assert (offload.offloaded_tensors, offload.offloaded_bytes) == (3, 2 * 20 * 16 * 4 + 20 * 20 * 4)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))
    assert torch.equal(extra.grad, 2 * extra)
    net(x)
    assert offload.offloaded_tensors == 3  # outside of the context nothing is seen
    with offload_activations.CheckpointHiddenStatesOffload(min_offload_bytes=2000) as larger_only:
        net(x)
    assert larger_only.offloaded_tensors == 0
