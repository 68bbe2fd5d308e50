"""Upstream's path of leaf modules: modules that ZeRO-3 gathers and releases as one.

The functions by class are ds_zero's; choosing by attribute name or its suffix is added here. Mark before
`deepspeed.initialize`: the units are cut then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ds_zero import (
    get_z3_leaf_modules,
    set_z3_leaf_modules,
    unset_z3_leaf_modules,
    z3_leaf_module,
    z3_leaf_parameter,
)

__all__ = [
    "get_z3_leaf_modules",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]


def set_z3_leaf_module(model: torch.nn.Module, flag: bool = True) -> None:
    """Mark one module as a leaf, or take its mark away."""
    model._z3_leaf = flag  # type: ignore[assignment]


def set_z3_leaf_modules_by_name(
    model: torch.nn.Module, module_names: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[torch.nn.Module], list[str]]:
    """Mark the modules with these full names ("layers.3.mlp"), or take their marks away.

    Returns (the modules, the names without one); ValueError where there are such and `raise_if_not_found`.
    """
    return _mark(model, module_names, lambda name, wanted: name == wanted, flag, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: torch.nn.Module, module_name_suffixes: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[torch.nn.Module], list[str]]:
    """The same for the modules whose full names end in these parts ("mlp.experts")."""
    return _mark(
        model,
        module_name_suffixes,
        lambda name, wanted: name == wanted or name.endswith(f".{wanted}"),
        flag,
        raise_if_not_found,
    )


def _mark(
    model: torch.nn.Module,
    wanted: Iterable[str],
    matches: Callable[[str, str], bool],
    flag: bool,
    raise_if_not_found: bool,
) -> tuple[list[torch.nn.Module], list[str]]:
    found: dict[torch.nn.Module, None] = {}
    missing: list[str] = []
    for text in wanted:
        hits = [module for name, module in model.named_modules() if matches(name, text)]
        found.update(dict.fromkeys(hits))
        if not hits:
            missing.append(text)
    if missing and raise_if_not_found:
        raise ValueError(
            f"{type(model).__name__} has no module named {', '.join(map(repr, missing))}; see model.named_modules() "
            "for the names, or pass raise_if_not_found=False"
        )
    for module in found:
        set_z3_leaf_module(module, flag)
    return list(found), missing
