"""Which parameters form a unit: found from the module tree, pure (no ranks, no tensors changed).

A block is a module that runs as a whole: each child of a ModuleList or Sequential whose parameter-holding children
are all of one class (transformer layers, residual stages). The outermost such container wins; a ModuleList inside a
block (experts) belongs to the block, so an expert that sees no token is still part of a unit that runs. Parameters
outside blocks are grouped by the module that owns them, neighbours merged up to `REST_NUMEL`.
`owners` of a unit are the modules around whose forward it is gathered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from ds_zero.errors import LayoutError

__all__ = ["Block", "block_modules", "find_blocks"]

REST_NUMEL = 1 << 22
"""Elements; small modules outside blocks (final norm, pooler, heads) share a unit up to this size."""

UnitSpec = Iterable[str | type[nn.Module]]


@dataclasses.dataclass
class Block:
    """Parameters gathered together and the modules whose forward needs them."""

    name: str
    owners: list[nn.Module]
    parameters: list[nn.Parameter]

    @property
    def numel(self) -> int:
        return sum(_numel(p) for p in self.parameters)


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _block_children(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Children of a container of like modules, or None if `module` is not one."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return None
    holders = [(n, c) for n, c in module.named_children() if next(c.parameters(), None) is not None]
    if len(holders) < 2 or len({type(c) for _, c in holders}) != 1:
        return None
    if isinstance(holders[0][1], (nn.ModuleList, nn.ModuleDict)):
        return None  # a container has no forward to hook: look inside it
    return holders


def _walk(
    module: nn.Module, prefix: str, named: set[nn.Module], automatic: bool
) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, is_block) in registration order; nothing below a block is visited."""
    if module in named:
        yield prefix, module, True
        return
    yield prefix, module, False
    children = _block_children(module) if automatic else None
    if children is not None:
        for name, child in children:
            yield f"{prefix}.{name}".lstrip("."), child, True
        return
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}.{name}".lstrip("."), named, automatic)


def _select(model: nn.Module, units: UnitSpec) -> set[nn.Module]:
    """Modules named by the user; LayoutError for a name or class that matches nothing."""
    chosen: set[nn.Module] = set()
    modules = dict(model.named_modules())
    for unit in units:
        if isinstance(unit, str):
            if unit not in modules:
                raise LayoutError(f"units: no module named {unit!r}; modules are named as in model.named_modules()")
            chosen.add(modules[unit])
        else:
            found = {m for m in modules.values() if isinstance(m, unit)}
            if not found:
                raise LayoutError(f"units: no module of class {unit.__name__} in the model")
            chosen |= found
    return chosen


def block_modules(model: nn.Module, units: UnitSpec | None = None) -> dict[str, nn.Module]:
    """The modules that are gathered as a whole (transformer blocks, as a rule), by name, in model order.

    Args and errors are those of `find_blocks`; what is outside of blocks is left out.
    """
    named, automatic = _named(model, units), units is None
    return {name: module for name, module, is_block in _walk(model, "", named, automatic) if is_block}


def _named(model: nn.Module, units: UnitSpec | None) -> set[nn.Module]:
    named = set() if units is None else _select(model, units)
    return named | {m for m in model.modules() if getattr(m, "_z3_leaf", False)}


def find_blocks(model: nn.Module, units: UnitSpec | None = None) -> list[Block]:
    """Partition all parameters of `model` into blocks, in model order, each parameter once (ties at first sight).

    Args:
        units: module names or classes to use as blocks instead of the automatic choice; `_z3_leaf` modules
            (set_z3_leaf_modules) are always blocks.
    Raises:
        LayoutError: a name or class that matches no module.
    """
    named = _named(model, units)
    blocks: list[Block] = []
    seen: dict[nn.Parameter, Block] = {}

    def claim(name: str, owner: nn.Module, parameters: Sequence[nn.Parameter], merge: bool) -> None:
        for parameter in parameters:  # a tied parameter's unit is gathered for every module that holds it
            if parameter in seen and owner not in seen[parameter].owners:
                seen[parameter].owners.append(owner)
        fresh = [p for p in dict.fromkeys(parameters) if p not in seen]
        if not fresh:
            return
        size = sum(_numel(p) for p in fresh)
        last = blocks[-1] if blocks else None
        if merge and last is not None and last.name.startswith("rest:") and last.numel + size <= REST_NUMEL:
            last.owners.append(owner)
            last.parameters += fresh
            block = last
        else:
            block = Block(("rest:" if merge else "") + (name or "root"), [owner], fresh)
            blocks.append(block)
        seen.update(dict.fromkeys(fresh, block))

    for name, module, is_block in _walk(model, "", named, automatic=units is None):
        if is_block:
            claim(name, module, list(module.parameters()), merge=False)
        else:
            claim(name, module, list(module.parameters(recurse=False)), merge=True)
    for block in blocks:
        block.name = block.name.removeprefix("rest:")
    return blocks
