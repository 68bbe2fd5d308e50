"""Optimizer state that is elsewhere between steps: no bit of training changes, and its memory is really free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Net, make_config, make_net, weights

import deepspeed
import ds_comm
import ds_zero
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.state_offload import OffloadedState
from ds_comm.testing import run_ranks


def engine_of(stage: int, dtype: str, folder: str | None = None, optimizer: str = "AdamW") -> Any:
    config = make_config(stage, dtype)
    config["optimizer"] = {"type": optimizer, "params": {"lr": 1e-2}}
    if optimizer == "SGD":
        config["optimizer"]["params"]["momentum"] = 0.9
    if folder is not None:
        config["zero_optimization"]["offload_optimizer"] = {"device": "none", "nvme_path": folder}
    return deepspeed.initialize(model=make_net(), config=config)[0]


def one_step(engine: Any, step: int) -> float:
    generator = torch.Generator().manual_seed(10 * step + ds_comm.get_rank())
    x, y = torch.randn(2, 8, generator=generator), torch.randn(2, 1, generator=generator)
    dtype = next(engine.module.parameters()).dtype
    loss = engine(x.to(dtype), y.to(dtype))
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def state_bytes(engine: Any) -> int:
    tensors = [t for state in engine.optimizer.state.values() for t in state.values() if t.dim() > 0]
    return sum(t.numel() * 4 for t in tensors)


def trained(stage: int, dtype: str, folder: str, optimizer: str, how: str) -> tuple[list[float], dict[str, Any], int]:
    """Five steps with the state elsewhere after the second; losses, weights and the bytes that were free."""
    engine = engine_of(stage, dtype, folder, optimizer)
    losses = [one_step(engine, step) for step in range(2)]
    free = 0
    if how != "stays":
        before = state_bytes(engine)
        engine.offload_states(device=OffloadDeviceEnum.nvme)
        free = before - state_bytes(engine)
        assert free == before > 0
        engine.offload_states(include=["optim_states"], device="nvme")  # a second time does nothing
        engine.eval()
        engine(torch.zeros(2, 8, dtype=next(engine.module.parameters()).dtype), torch.zeros(2, 1))
        engine.train()
        if how == "reload":
            engine.reload_states()
            assert state_bytes(engine) == before
        if how == "save":
            engine.save_checkpoint(f"{folder}/save", tag="now")
            assert state_bytes(engine) == before
        engine.empty_partition_cache()
    losses += [one_step(engine, step) for step in range(2, 5)]
    after = weights(engine)
    engine.destroy()
    return losses, after, free


def compare(folder: str) -> list[int]:
    found = []
    for stage, dtype, optimizer, how in [
        (0, "fp32", "AdamW", "reload"),
        (2, "bf16", "AdamW", "step"),
        (3, "bf16", "AdamW", "save"),
        (1, "fp32", "SGD", "step"),
        (3, "fp32", "Lamb", "reload"),
    ]:
        plain = trained(stage, dtype, folder, optimizer, "stays")
        moved = trained(stage, dtype, folder, optimizer, how)
        assert plain[0] == moved[0], (stage, dtype, optimizer)
        assert all(torch.equal(plain[1][name], moved[1][name]) for name in plain[1])
        found.append(moved[2])
    return found


def test_two_ranks_go_on_with_the_same_bits(tmp_path: Path) -> None:
    one, other = run_ranks(compare, 2, str(tmp_path))
    parameters = sum(p.numel() for p in Net().parameters())
    assert one[0] == other[0] >= 2 * 4 * parameters  # stage 0: both moments of everything and the padding, on both
    assert 0 < one[2] <= one[0] / 2  # stage 3: of half
    assert {path.name for path in tmp_path.iterdir()} == {"save"}  # the files of the state have no names


def test_host_memory_takes_it_too() -> None:
    engine, other = engine_of(2, "bf16"), engine_of(2, "bf16")
    for step in range(2):
        one_step(engine, step), one_step(other, step)
    before = state_bytes(engine)
    away = OffloadedState(engine.optimizer, None)
    assert away.nbytes >= before and state_bytes(engine) == 0
    assert engine.optimizer.state_dict()["optimizer_state_dict"]["state"][0]["exp_avg"].numel() > 0  # brings it back
    assert away.nbytes == 0 and state_bytes(engine) == before
    assert one_step(engine, 2) == one_step(other, 2) and one_step(engine, 3) == one_step(other, 3)


def test_what_cannot_be_moved_is_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    engine = engine_of(1, "fp32", str(tmp_path / "missing"))
    one_step(engine, 0)
    with caplog.at_level("INFO", logger="DeepSpeed"):
        engine.offload_states()
        assert "in host memory already" in caplog.text
    with pytest.raises(ValueError, match="include has 'optimizer_states'; expected optim_states or hp_params"):
        engine.offload_states(include=["optimizer_states"])
    for device in ("none", "disk", None):
        with pytest.raises(ValueError, match=f"device has {device!r}; expected cpu or nvme"):
            engine.offload_states(device=device)
    with pytest.raises(OSError, match="missing"):
        engine.offload_states(device="nvme")
    assert one_step(engine, 1) > 0  # nothing was lost
    engine.reload_states()
    config = make_config(0)
    del config["optimizer"]
    with pytest.raises(ds_zero.ZeroStateError, match="needs an optimizer"):
        deepspeed.initialize(model=make_net(), config=config)[0].offload_states(include=list(OffloadStateTypeEnum))
