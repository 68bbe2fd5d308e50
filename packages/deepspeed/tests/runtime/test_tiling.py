"""A grid of tiles computes what the layer computes, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.runtime.zero.utils import ZeRORuntimeException, is_zero_param
from deepspeed.zero import TiledLinear, TiledLinearReturnBias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_splits", "out_splits"), [(1, 1), (2, 3), (3, 1), (1, 7)])
def test_equals_the_layer(in_splits: int, out_splits: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 7, bias=bias)
    tiled = TiledLinear(8, 7, bias, in_splits, out_splits, init_linear=plain)
    x = torch.randn(2, 3, 8)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(t) for layer, t in zip((plain, tiled), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert sum(p.numel() for p in tiled.parameters()) == sum(p.numel() for p in plain.parameters())


def test_split_inputs_and_outputs() -> None:
    plain = nn.Linear(5, 4)
    tiled = TiledLinear(5, 4, True, 2, 2, True, False, init_linear=plain)
    x = torch.randn(3, 5)
    parts = tiled([x[:, :3], x[:, 3:]])
    assert [tuple(part.shape) for part in parts] == [(3, 2), (3, 2)]
    torch.testing.assert_close(torch.cat(parts, dim=1), plain(x))
    with pytest.raises(ValueError, match="1 splits; expected 2"):
        tiled([x])


class LateBias(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return torch.nn.functional.linear(x, self.weight), self.bias


def test_layers_that_return_their_bias() -> None:
    plain = nn.Linear(6, 4)
    tiled = TiledLinearReturnBias(6, 4, True, 2, 2, linear_cls=LateBias, init_linear=plain)
    x = torch.randn(3, 6)
    output, bias = tiled(x)
    torch.testing.assert_close(output + bias, plain(x))


def test_bad_splits_and_layers() -> None:
    with pytest.raises(ValueError, match="in_splits is 9; expected 1 to in_features = 8"):
        TiledLinear(8, 8, in_splits=9)
    with pytest.raises(ValueError, match="expected"):
        TiledLinear(8, 8, init_linear=nn.Linear(8, 8, bias=False))
    with pytest.raises(ValueError, match=r"weight is \(8, 7\)"):
        TiledLinear(8, 8, init_linear=nn.Linear(7, 8))


def test_is_zero_param() -> None:
    assert not is_zero_param(nn.Parameter(torch.ones(1))) and not is_zero_param(None)
    assert issubclass(ZeRORuntimeException, Exception)
    assert deepspeed.is_compile_supported()
