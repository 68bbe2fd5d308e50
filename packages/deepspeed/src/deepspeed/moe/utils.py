"""Which parameters are experts', and parameter groups that keep them apart, as scripts of upstream's make them.

Here groups need not be kept apart: an optimizer over `model.parameters()` trains experts like any others. Groups that
bear `moe: True` and a `name` are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from deepspeed.moe.layer import MoE

__all__ = [
    "configure_moe_param_groups",
    "has_moe_layers",
    "is_moe_param",
    "is_moe_param_group",
    "split_params_grads_into_shared_and_expert_params",
    "split_params_into_different_moe_groups_for_optimizer",
    "split_params_into_shared_and_expert_params",
]

Group = dict[str, Any]


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether a model has `MoE` layers, and how many experts the first of them has (else 0)."""
    first = next((module for module in m.modules() if isinstance(module, MoE)), None)
    return first is not None, 0 if first is None else first.num_experts


def is_moe_param(param: Tensor) -> bool:
    """Whether it is an expert's."""
    return getattr(param, "allreduce", True) is False


def split_params_into_shared_and_expert_params(
    params: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(those of all tokens, the experts')."""
    listed = list(params)
    return [p for p in listed if not is_moe_param(p)], [p for p in listed if is_moe_param(p)]


def split_params_grads_into_shared_and_expert_params(
    group: Iterable[nn.Parameter],
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of both kinds; parameters without one are left out."""
    shared, experts = split_params_into_shared_and_expert_params(group)
    return [p.grad for p in shared if p.grad is not None], [p.grad for p in experts if p.grad is not None]


def is_moe_param_group(param_group: Group) -> bool:
    """Whether a group is experts'."""
    return bool(param_group.get("moe", False))


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: Group | Sequence[Group], max_group_size: float | None = 178956971
) -> list[Group]:
    """Move experts' parameters to groups of their own, after the given ones, with `moe: True`.

    Args:
        param_groups: with a `name` each; their other keys are copied to the experts' groups, which are named by the
            experts' `group_name`.
        max_group_size: most elements of an experts' group (None: no limit); one parameter may be larger.
    Raises:
        ValueError: a group without a `name`.
    """
    given = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    shared_groups, expert_groups = [], []
    for group in given:
        if "name" not in group:
            raise ValueError(f"a parameter group has no 'name', only {sorted(group)}; give each group one")
        shared, experts = split_params_into_shared_and_expert_params(group["params"])
        shared_groups.append({**group, "params": shared})
        by_name: dict[str, list[nn.Parameter]] = {}
        for parameter in experts:
            by_name.setdefault(getattr(parameter, "group_name", ""), []).append(parameter)
        for name, members in by_name.items():
            parts = _parts(members, max_group_size)
            expert_groups += [{**group, "params": part, "name": name, "moe": True} for part in parts]
    return shared_groups + expert_groups


def _parts(parameters: list[nn.Parameter], max_numel: float | None) -> list[list[nn.Parameter]]:
    """In order, each of at most so many elements."""
    parts: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        numel = int(getattr(parameter, "ds_numel", parameter.numel()))
        if parts[-1] and max_numel is not None and size + numel > max_numel:
            parts.append([])
            size = 0
        parts[-1].append(parameter)
        size += numel
    return parts


def configure_moe_param_groups(model_parameters: list[Any]) -> list[Group]:
    """Groups that keep experts apart, of parameters (named "dense-params") or of groups; groups that do so already
    are given back."""
    listed = list(model_parameters)
    if all(isinstance(entry, dict) for entry in listed):
        if any(is_moe_param_group(group) for group in listed):
            return listed
        return split_params_into_different_moe_groups_for_optimizer(listed)
    return split_params_into_different_moe_groups_for_optimizer({"params": listed, "name": "dense-params"})
