"""Leaf modules by class, name and suffix."""

from __future__ import annotations

import pytest
from torch import nn

from deepspeed.utils import (
    get_z3_leaf_modules,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    z3_leaf_module,
)


def model() -> nn.Module:
    block = lambda: nn.ModuleDict({"mlp": nn.Linear(2, 2), "big_mlp": nn.Linear(2, 2)})  # noqa: E731
    return nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "mlp": nn.ReLU()})


def names(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if z3_leaf_module(module)]


def test_by_class_marks_what_accelerate_looks_for() -> None:
    net = model()
    set_z3_leaf_modules(net, [nn.Linear])
    assert len(get_z3_leaf_modules(net)) == 4
    assert all(hasattr(m, "_z3_leaf") and m._z3_leaf for m in net.modules() if isinstance(m, nn.Linear))


def test_by_name_and_suffix() -> None:
    net = model()
    assert len(set_z3_leaf_modules_by_name(net, ["layers.1.mlp"])[0]) == 1
    assert names(net) == ["layers.1.mlp"]
    assert len(set_z3_leaf_modules_by_suffix(net, ["mlp"])[0]) == 3
    assert names(net) == ["layers.0.mlp", "layers.1.mlp", "mlp"]
    set_z3_leaf_module(net["mlp"], False)
    assert names(net) == ["layers.0.mlp", "layers.1.mlp"]


def test_missing_names_are_named() -> None:
    with pytest.raises(ValueError, match=r"'layers.9.mlp'"):
        set_z3_leaf_modules_by_name(model(), ["layers.0.mlp", "layers.9.mlp"])
    assert set_z3_leaf_modules_by_suffix(model(), ["nothing"], raise_if_not_found=False) == ([], ["nothing"])
