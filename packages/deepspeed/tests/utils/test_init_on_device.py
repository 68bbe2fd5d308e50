"""OnDevice: device and dtype inside the block, everything as before after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.utils import OnDevice


def test_models_are_built_in_no_memory() -> None:
    with OnDevice(dtype=torch.bfloat16):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(5, 6))
        old = nn.Parameter(torch.Tensor(2, 3))
    for tensor in [*net.parameters(), old]:
        assert tensor.is_meta and tensor.dtype == torch.bfloat16
    assert net[1].num_batches_tracked.dtype == torch.int64 and net[1].running_mean.dtype == torch.bfloat16


def test_everything_is_as_before_afterwards() -> None:
    with pytest.raises(KeyError), OnDevice(dtype=torch.float16):
        raise KeyError
    assert "__new__" not in torch.Tensor.__dict__
    for tensor in (torch.zeros(2), torch.Tensor(2, 2), nn.Linear(1, 1).weight):
        assert tensor.device.type == "cpu" and tensor.dtype == torch.float32


def test_blocks_nest_and_the_inner_one_wins() -> None:
    with OnDevice(dtype=torch.bfloat16):
        with OnDevice(dtype=torch.float16, device="cpu"):
            inner = [torch.zeros(1), torch.Tensor(1, 1), torch.ones(1, dtype=torch.float64)]
        outer = [torch.zeros(1), torch.Tensor(1, 1)]
    assert {(t.dtype, t.device.type) for t in inner} == {(torch.float16, "cpu")}
    assert {(t.dtype, t.device.type) for t in outer} == {(torch.bfloat16, "meta")}


def test_integers_and_data_keep_their_type() -> None:
    with OnDevice(dtype=torch.float16, device="cpu"):
        assert torch.full((2,), 3).dtype == torch.int64
        assert torch.full((2,), 3.0).dtype == torch.float16
        assert torch.zeros(2, dtype=torch.int32).dtype == torch.int32
        assert torch.Tensor([1.0, 2.0]).tolist() == [1, 2]
        assert (1.0 / 10 ** (torch.arange(0, 4, 2).float() / 4)).dtype == torch.float32  # rotary frequencies


def test_disabled_does_nothing_and_no_dtype_leaves_it() -> None:
    with OnDevice(dtype=torch.float16, enabled=False):
        assert torch.zeros(1).dtype == torch.float32 and not torch.zeros(1).is_meta
    with OnDevice(device="meta"):
        assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).is_meta
