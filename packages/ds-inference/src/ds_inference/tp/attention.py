"""Attention modules on a rank: their own counts of heads, and what they are given per head.

Plans split heads so that what a rank holds is again grouped-query attention with equal groups. The code of an
attention module therefore runs as it is, once its numbers (attributes, and those that it reads from its configuration)
are the rank's. The configuration of the whole model stays as it is; an attention module gets a copy of its own.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ds_inference.errors import ModelError
from ds_inference.tp import names
from ds_inference.tp.plan import TensorParallelPlan
from ds_inference.tp.split import Range

__all__ = ["HeadBiases", "adapt_attention", "attention_modules", "check_attention", "head_norms"]

_QUERIES = {"num_heads", "num_attention_heads", "n_heads", "n_head"}
_KEYS = {"num_key_value_heads", "num_kv_heads", "n_kv_heads"}
_GROUPS = {"num_key_value_groups", "n_rep"}
_WIDTHS = {"embed_dim", "all_head_size", "split_size", "inner_dim"}
_BIASES = ("alibi", "position_bias")
_HEAD_UNITS = ("heads", "kv_heads", "qkv", "groups")


@dataclass(frozen=True)
class HeadBiases:
    """A forward pre-hook that gives an attention module the position biases, and the masks per head, of its heads."""

    num_heads: int
    heads: Range
    names: tuple[str, ...]
    """The module's arguments in order."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = tuple(self._own(name, value) for name, value in zip(self.names, args, strict=False))
        return given + args[len(given) :], {name: self._own(name, value) for name, value in kwargs.items()}

    def _own(self, name: str, value: Any) -> Any:
        """[batch * heads, ...], [heads, ...] (MPT) or [batch, heads, queries, keys] -> that of the local heads."""
        if name not in (*_BIASES, "attention_mask") or not isinstance(value, Tensor):
            return value
        low, high = self.heads
        if value.dim() == 4 and value.shape[1] == self.num_heads:
            return value[:, low:high]
        if name == "position_bias" and value.dim() == 3 and value.shape[0] == self.num_heads:
            return value[low:high]
        if name == "alibi" and value.dim() == 3:
            return value.unflatten(0, (-1, self.num_heads))[:, low:high].flatten(0, 1)
        return value


def attention_modules(model: nn.Module, plan: TensorParallelPlan) -> dict[str, nn.Module]:
    """The modules whose queries, keys and values are split, by name."""
    homes = {e.module.name.rpartition(".")[0] for e in plan.entries if e.style == "column" and e.unit in _HEAD_UNITS}
    return {name: model.get_submodule(name) for name in sorted(homes)}


def head_norms(model: nn.Module, plan: TensorParallelPlan) -> list[nn.Parameter]:
    """Replicated parameters that every rank applies to its own heads: their gradients are parts of the whole."""
    homes = attention_modules(model, plan)
    found: list[nn.Parameter] = []
    for entry in plan.entries:
        name = entry.module.name
        if "norm" in entry.module.kind and names.is_head_norm(name) and name.rpartition(".")[0] in homes:
            found += model.get_submodule(name).parameters()
    return found


def check_attention(model: nn.Module, plan: TensorParallelPlan) -> None:
    """ModelError for attention that holds something per head which the plan does not know of."""
    count = plan.heads.num_heads
    for name, module in attention_modules(model, plan).items():
        for own, parameter in module.named_parameters(recurse=False):
            raise ModelError(
                f"{name} has a parameter {own} of shape {tuple(parameter.shape)} of its own, and how it belongs to its "
                f"{count} heads is not known; run this model on one tensor-parallel rank"
            )
        if getattr(module, "pretraining_tp", 1) > 1 and getattr(module, "slow_but_exact", False):
            raise ModelError(f"{name} slices its weights itself (slow_but_exact); set slow_but_exact=False")
    for entry in plan.entries:
        shape = entry.module.shape
        if "norm" in entry.module.kind and names.is_head_norm(entry.module.name) and len(shape) > 1:
            raise ModelError(
                f"{entry.module.name} has a weight {shape} per head; run this model on one tensor-parallel rank"
            )


def adapt_attention(model: nn.Module, plan: TensorParallelPlan, rank: int) -> None:
    """Give every attention module the numbers of `rank`'s heads."""
    heads = plan.heads
    queries, keys = (high - low for low, high in (heads.query[rank], heads.kv[rank]))
    for module in attention_modules(model, plan).values():
        for attribute, value in vars(module).copy().items():
            if type(value) is int:
                setattr(module, attribute, _local(attribute, value, plan, queries, keys))
        config = getattr(module, "config", None)
        if config is not None:
            module.config = _local_config(config, plan, queries, keys)
        parameters = tuple(inspect.signature(module.forward).parameters)
        if any(name in parameters for name in _BIASES):
            hook = HeadBiases(heads.num_heads, heads.query[rank], parameters)
            module.register_forward_pre_hook(hook, with_kwargs=True)


def _local(attribute: str, value: int, plan: TensorParallelPlan, queries: int, keys: int) -> int:
    """What an attribute of an attention module becomes, if it is one of heads."""
    heads = plan.heads
    if attribute in _QUERIES and value == heads.num_heads:
        return queries
    if attribute in _KEYS and value == heads.num_kv_heads:
        return keys
    if attribute in _GROUPS and value == heads.num_heads // heads.num_kv_heads:
        return queries // keys
    if attribute in _WIDTHS and value % heads.num_heads == 0:
        return value // heads.num_heads * queries
    return value


def _local_config(config: Any, plan: TensorParallelPlan, queries: int, keys: int) -> Any:
    local = copy.copy(config)
    local.__dict__ = dict(config.__dict__)
    for attributes, whole, own in (
        (_QUERIES, plan.heads.num_heads, queries),
        (_KEYS, plan.heads.num_kv_heads, keys),
    ):
        for attribute in attributes & set(local.__dict__):
            if local.__dict__[attribute] == whole:
                local.__dict__[attribute] = own
    return local
