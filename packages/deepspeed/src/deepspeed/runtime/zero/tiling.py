"""A large linear layer as a grid of small ones, so that at stage 3 only one tile's weight is gathered at a time.

    y = x W^T + b,   W = [W_oi] for output split o and input split i:   y_o = sum over i of x_i W_oi^T + b_o

Outside of transformer blocks (a head, a projection of embeddings) each large tile is a unit of its own; inside one, the
block is the unit and tiles save nothing. With one split each way this is the layer itself. The sum over input splits is
in the order of the splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.runtime.utils import partition_uniform
from ds_zero import GatheredParameters

__all__ = ["TiledLinear", "TiledLinearReturnBias"]


class TiledLinear(nn.Module):
    """A linear layer [in_features -> out_features] in `in_splits` x `out_splits` tiles.

    Args:
        input_is_already_split: forward gets a list of the input's splits instead of the whole input.
        combine_out_splits: forward returns one tensor; False: the list of the output's splits.
        linear_cls: class of the tiles, called as (in, out, bias=..., **kwargs).
        init_linear: a layer whose weights the tiles take over; None leaves the tiles' own initialisation.
    Raises:
        ValueError: splits that are not between 1 and the features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, splits, features in (("in", in_splits, in_features), ("out", out_splits, out_features)):
            if not 1 <= splits <= features:
                raise ValueError(f"{name}_splits is {splits}; expected 1 to {name}_features = {features}")
        self.in_features, self.out_features = in_features, out_features
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.use_bias = bias
        self.in_parts = partition_uniform(in_features, in_splits)
        self.out_parts = partition_uniform(out_features, out_splits)
        # Only the last tile of a row adds the bias, once for the whole sum.
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(
                    self.in_parts[i + 1] - self.in_parts[i],
                    self.out_parts[o + 1] - self.out_parts[o],
                    bias=bias and i == in_splits - 1,
                    **kwargs,
                )
                for i in range(in_splits)
            )
            for o in range(out_splits)
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, x: Any) -> Any:
        """[..., in_features] (or the list of its splits) -> [..., out_features] (or the list of its splits)."""
        parts = list(x) if self.input_is_already_split else self._split(x)
        if len(parts) != self.in_splits:
            raise ValueError(f"the input has {len(parts)} splits; expected {self.in_splits}")
        outputs = [self._row(row, parts) for row in self._rows()]
        return self._combined(outputs) if self.combine_out_splits else outputs

    def _rows(self) -> list[list[nn.Module]]:
        return [list(row) for row in self.linears]  # type: ignore[call-overload]

    def _split(self, x: Tensor) -> list[Tensor]:
        widths = [b - a for a, b in zip(self.in_parts, self.in_parts[1:], strict=False)]
        return list(torch.split(x, widths, dim=-1))

    def _row(self, row: Sequence[nn.Module], parts: Sequence[Tensor]) -> Any:
        total: Tensor = row[0](parts[0])
        for tile, part in zip(row[1:], parts[1:], strict=True):
            total = total + tile(part)
        return total

    def _combined(self, outputs: list[Any]) -> Any:
        return torch.cat(outputs, dim=-1)

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Take the weights of an ordinary linear layer of the same size, tile by tile; sharded ones are gathered."""
        weight, bias = other.weight, getattr(other, "bias", None)
        if not isinstance(weight, Tensor) or (bias is None) == self.use_bias:
            raise ValueError(
                f"copy_params_from: a layer with a weight and {'a' if self.use_bias else 'no'} bias is expected, not "
                f"{type(other).__name__}"
            )
        source = [weight] if bias is None else [weight, bias]
        with GatheredParameters(source):
            if tuple(weight.shape) != (self.out_features, self.in_features):
                expected = (self.out_features, self.in_features)
                raise ValueError(f"copy_params_from: weight is {tuple(weight.shape)}; expected {expected}")
            for o, row in enumerate(self._rows()):
                rows = slice(self.out_parts[o], self.out_parts[o + 1])
                for i, tile in enumerate(row):
                    with GatheredParameters(list(tile.parameters()), modifier_rank=0):
                        tile.weight.copy_(weight[rows, self.in_parts[i] : self.in_parts[i + 1]])  # type: ignore[operator]
                        if isinstance(bias, Tensor) and i == self.in_splits - 1:
                            tile.bias.copy_(bias[rows])  # type: ignore[operator]


class TiledLinearReturnBias(TiledLinear):
    """The same for layers whose forward returns (output, bias), as Megatron's do: so does this one's forward."""

    def _row(self, row: Sequence[nn.Module], parts: Sequence[Tensor]) -> Any:
        total, bias = row[0](parts[0])
        for tile, part in zip(row[1:], parts[1:], strict=True):
            output, bias = tile(part)
            total = total + output
        return total, bias

    def _combined(self, outputs: list[Any]) -> Any:
        totals, biases = [total for total, _ in outputs], [bias for _, bias in outputs]
        return torch.cat(totals, dim=-1), torch.cat(biases, dim=-1) if self.use_bias else None
