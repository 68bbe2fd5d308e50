"""`Experts`: the expert modules of one layer, each a copy of the one that was given.

Every expert runs in every forward, with no rows if no token reached it: its parameters then have zero gradients rather
than none, and ranks never disagree about which modules ran.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_zero import GatheredParameters

__all__ = ["Experts", "copies_of"]


def copies_of(module: nn.Module, number: int) -> list[nn.Module]:
    """Deep copies; whole ones of a module that `zero.Init` has sharded, to be sharded with what holds them."""
    sharded = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    with GatheredParameters(sharded, enabled=bool(sharded)):
        return [copy.deepcopy(module) for _ in range(number)]


class Experts(nn.Module):
    """`num_local_experts` deep copies of `expert`, in `deepspeed_experts`.

    Their parameters bear `allreduce = False` and `group_name`, by which scripts tell them from others.
    """

    def __init__(self, expert: nn.Module, num_local_experts: int = 1, expert_group_name: str | None = None) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(copies_of(expert, num_local_experts))
        self.num_local_experts = num_local_experts
        for parameter in self.deepspeed_experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]  # upstream's marks
            parameter.group_name = expert_group_name  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Run each expert on its tokens.

        Args:
            inputs: [groups, num_local_experts, capacity, hidden]; with `sizes`: [rows, hidden], sorted by expert.
            sizes: rows of each expert.
        Returns:
            Like `inputs`. Of an expert that returns a tuple, such as (output, bias), the first element counts.
        """
        if sizes is None:
            return torch.cat(self._run(inputs.chunk(self.num_local_experts, dim=1)), dim=1)
        parts = [part[None, None] for part in inputs.split(list(sizes))]  # 4-D, as experts are given it upstream
        return torch.cat([out.flatten(0, -2) for out in self._run(parts)])

    def _run(self, parts: Sequence[Tensor]) -> list[Tensor]:
        outputs = (expert(part) for expert, part in zip(self.deepspeed_experts, parts, strict=True))
        return [out[0] if isinstance(out, tuple) else out for out in outputs]
