"""What a model's modules say of themselves: the input of the plan, and what the plan must not be led into.

`read_modules` turns an `nn.Module` into `ModuleInfo`s in order of registration. A module is taken for a linear layer,
an embedding or stacked experts only if its own code computes just that: a subclass that does something else is
"other", stays whole, and a plan that would need it split refuses the model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ds_inference.errors import ModelError
from ds_inference.tp import names
from ds_inference.tp.plan import Kind, ModelFacts, ModuleInfo, Rule, TensorParallelPlan

__all__ = ["check_ties", "facts_of", "is_stacked_experts", "policy_rules", "read_modules", "stacked_names"]

_SAME_AS_LINEAR = {"FalconLinear"}
_SCALED = "ScaledWordEmbedding"
_STACKED = ("gate_up_proj", "down_proj")


def facts_of(model: nn.Module) -> ModelFacts:
    """Heads and vocabulary from the model's transformers configuration; ModelError when it has none."""
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"{type(model).__name__} has no configuration to read its attention heads from; pass facts="
            "ModelFacts(num_heads=..., num_kv_heads=..., vocab_size=...)"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return ModelFacts.from_config(text)


def read_modules(model: nn.Module) -> list[ModuleInfo]:
    """All modules with a weight, in order of registration; stacked experts by their parameters' names."""
    found: list[ModuleInfo] = []
    for name, module in model.named_modules():
        if is_stacked_experts(module):
            found += [
                ModuleInfo(f"{name}.{one}", "linear", tuple(getattr(module, one).shape)) for one in stacked_names()
            ]
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            bias = isinstance(getattr(module, "bias", None), nn.Parameter)
            found.append(ModuleInfo(name, _kind(module), tuple(weight.shape), bias))
    return found


def stacked_names() -> Sequence[str]:
    """The parameters of stacked experts: [experts, 2 * width, hidden] and [experts, hidden, width]."""
    return _STACKED


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether a module keeps its experts' weights in two parameters of three dimensions, and nothing else."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) != set(_STACKED) or any(p.dim() != 3 for p in own.values()):
        return False
    up, down = own["gate_up_proj"].shape, own["down_proj"].shape
    return up[0] == down[0] and up[1] == 2 * down[2] and up[2] == down[1]


def _kind(module: nn.Module) -> Kind:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward or kind in _SAME_AS_LINEAR
        return "linear" if plain else "other"
    weight = module.get_parameter("weight")
    if kind == "Conv1D" and weight.dim() == 2:
        return "linear_t"
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or kind.endswith(_SCALED)
        plain = plain and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if plain else "other"
    if isinstance(module, nn.LayerNorm):
        return "layer_norm"
    return "norm" if "norm" in kind.lower() else "other"


def policy_rules(model: nn.Module, policy: Any) -> list[Rule]:
    """Upstream's `injection_policy`, {module class: names of its row-parallel layers}, as rules.

    ModelError for a name that no module of that class has.
    """
    rules: list[Rule] = []
    for cls, given in dict(policy).items():
        ends = [given] if isinstance(given, str) else list(given)
        for end in ends:
            homes = [name for name, module in model.named_modules() if isinstance(module, cls) and _has(module, end)]
            if not homes:
                raise ModelError(
                    f"injection_policy says that {end!r} of {cls.__name__} is row-parallel, but no such module has one"
                )
            found = sorted({names.collapsed(f"{home}.{end}") for home in homes})
            pattern = "|".join(re.escape(name).replace(r"\*", r"\d+") for name in found)
            rules.append(Rule(f"^(?:{pattern})$", "row"))
    return rules


def _has(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def check_ties(model: nn.Module, plan: TensorParallelPlan) -> None:
    """Parameters that are one object must be split alike: ModelError names those that would not be."""
    parts = [plan.tensors(rank) for rank in range(plan.num_ranks)]
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    for tied in _several(same.values()):
        planned = [name for name in tied if name in parts[0]]
        for name in planned[1:]:
            if any(part[name] != part[planned[0]] for part in parts):
                raise ModelError(
                    f"{planned[0]} and {name} are one parameter, but would be split differently; give a Rule for both "
                    "('replicated' is always right)"
                )


def _several(groups: Any) -> Iterator[list[str]]:
    return (group for group in groups if len(group) > 1)
