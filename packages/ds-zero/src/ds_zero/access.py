"""Read and edit masters, gradients and optimizer state of single parameters, at any stage.

The full variants are collectives over the ranks that share the model; the local ones never communicate. A parameter
that no `shard()` laid out gives None (getters) or is left alone (setters), as upstream does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_comm import ReduceOp
from ds_zero._unit import GradKind
from ds_zero.errors import ZeroStateError
from ds_zero.sharded import Place, place_of

__all__ = [
    "get_z3_leaf_modules",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "set_z3_leaf_modules",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]


# -- ranges ------------------------------------------------------------------------------------------------------


def _own(place: Place, flat: Tensor | None) -> tuple[int, Tensor] | None:
    """The part of one parameter inside a tensor laid out like the own range: (first element, view)."""
    if flat is None:
        return None
    unit, slot = place.unit, place.unit.layout.slots[place.index]
    low, high = max(unit.start, slot.offset), min(unit.stop, slot.stop)
    high = max(low, high)
    return low - slot.offset, flat[low - unit.start : high - unit.start]


def full_of_part(place: Place, own: tuple[int, Tensor] | None, label: str) -> Tensor | None:
    """Full fp32 parameter-shaped tensor from every rank's part (collective where the state is sharded)."""
    if own is None:
        return None
    slot = place.unit.layout.slots[place.index]
    start, part = own
    full = torch.zeros(slot.numel, dtype=torch.float32, device=place.unit.device)
    full[start : start + part.numel()].copy_(part)
    if place.owner.parts.state:
        place.unit.comm.all_reduce(full, label=f"{label} of {slot.name}")
    return full.view(slot.shape)


def write_part(place: Place, own: tuple[int, Tensor] | None, value: Tensor, label: str) -> None:
    """Write the own part of a full value."""
    slot = place.unit.layout.slots[place.index]
    if tuple(value.shape) != slot.shape:
        raise ZeroStateError(f"{label} of {slot.name!r} has shape {slot.shape}, got {tuple(value.shape)}")
    if own is not None:
        start, part = own
        part.copy_(value.reshape(-1)[start : start + part.numel()])


def _master(place: Place) -> Tensor | None:
    unit = place.unit
    place.owner.gate.wait()
    with torch.no_grad():
        unit.absorb_edits()
    return unit.master if unit.master is not None else unit.storage.own


def _grad(place: Place) -> Tensor | None:
    """The accumulated gradient, laid out like the own range: the mean, or the running sum (`_grad_factor`)."""
    unit = place.unit
    return None if unit.grad_kind is GradKind.EMPTY else unit.grad


def part_of_gradient(place: Place) -> tuple[int, Tensor] | None:
    """This rank's elements of the accumulated gradient: (first element, view)."""
    return _own(place, _grad(place))


def _grad_factor(place: Place) -> float:
    """What `_grad` is multiplied by to be the mean gradient without loss scale. Reading never changes the sum."""
    optimizer = _optimizer(place)
    mean: float = optimizer.reducer.scale if place.unit.grad_kind is GradKind.SUM else 1.0
    return mean / float(optimizer.loss_scale)


def _optimizer(place: Place) -> Any:
    return place.owner.module.__dict__.get("_zero_optimizer")


def _state(place: Place, key: str) -> tuple[int, Tensor] | None:
    """The own part of an optimizer state tensor."""
    optimizer, unit = _optimizer(place), place.unit
    if optimizer is None or unit.master is None:
        return None
    optimizer.gate.wait()
    slot = unit.layout.slots[place.index]
    low, high = max(unit.start, slot.offset), min(unit.stop, slot.stop)
    if low >= high:
        return None
    for segment in optimizer.inner.segments:
        first = unit.start + segment.offset
        if segment.unit is unit and first <= low < first + segment.numel:
            value = optimizer.optimizer.state[segment.parameter].get(key)
            if value is None:
                return None
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise ZeroStateError(
                    f"optimizer state {key!r} is one number per parameter, not one per element: {value}"
                )
            return low - slot.offset, value[low - first : high - first]
    return None


def _before_master_write(place: Place) -> None:
    """Gathering is one-sided on shared memory: wait until no rank reads the old values any more (collective)."""
    place.owner.gate.wait()
    if place.unit.sharded:
        place.unit.comm.barrier(label=f"before {place.unit.layout.name} is written")


def _after_master_write(place: Place) -> None:
    """Bring a changed master into the parameters (collective)."""
    unit = place.unit
    with torch.no_grad():
        if unit.master is not None and unit.master is not unit.storage.own:
            unit.storage.own.copy_(unit.master)
        unit.publish(place.owner.config.allgather_bucket_size)


# -- full --------------------------------------------------------------------------------------------------------


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The full fp32 master, in the parameter's shape (a copy)."""
    place = place_of(param)
    return None if place is None else full_of_part(place, _own(place, _master(place)), "master")


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The full mean gradient in fp32, loss scale divided out; `param.grad` if that is set; None without one."""
    if param.grad is not None:
        return param.grad
    place = place_of(param)
    if place is None:
        return None
    optimizer = _optimizer(place)
    if optimizer is not None:
        optimizer.end_backward()
    full = full_of_part(place, part_of_gradient(place), "gradient")
    return None if full is None else full.mul_(_grad_factor(place))


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """The full optimizer state `optim_state_key` ("exp_avg", ...) in fp32; None before it exists."""
    place = place_of(param)
    if place is None or place.unit.master is None:
        return None
    own, problem = None, None
    try:
        own = _state(place, optim_state_key)
    except ZeroStateError as error:
        problem = error
    if place.owner.parts.state:  # a rank that owns no element of it cannot know whether it exists, or is a number
        found = torch.tensor([2.0 if problem else float(own is not None)], device=place.unit.device)
        place.unit.comm.all_reduce(found, ReduceOp.MAX, label=f"whether {optim_state_key} exists")
        if float(found) == 1.0:
            own = own or (0, torch.empty(0, device=place.unit.device))
        elif float(found) == 2.0 and problem is None:
            problem = ZeroStateError(
                f"optimizer state {optim_state_key!r} is one number per parameter, not one per element"
            )
    if problem is not None:
        raise problem
    return full_of_part(place, own, optim_state_key)


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Replace the master, and with it the parameter; every rank passes the full value."""
    place = place_of(param)
    if place is not None:
        _before_master_write(place)
        write_part(place, _own(place, _master(place)), value, "master")
        _after_master_write(place)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Replace the accumulated mean gradient; every rank passes the full value."""
    if param.grad is not None:
        param.grad.copy_(value)
        return
    place = place_of(param)
    if place is not None:
        grad = _grad(place)
        write_part(place, _own(place, grad), value if grad is None else value / _grad_factor(place), "gradient")


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Replace the optimizer state `optim_state_key`; every rank passes the full value."""
    place = place_of(param)
    if place is not None:
        place.owner.gate.wait()
        write_part(place, _state(place, optim_state_key), value, optim_state_key)


def safe_update_full_grad_vectorized(
    param_list: Iterable[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """`grad = update_func(grad, parameter)` for every parameter that has one."""
    for parameter in param_list:
        if not parameter.requires_grad:
            continue
        grad = safe_get_full_grad(parameter)
        if grad is not None:
            safe_set_full_grad(parameter, update_func(grad, parameter))


# -- local (stage 3) ---------------------------------------------------------------------------------------------


def _local_place(parameter: nn.Parameter) -> Place:
    place = place_of(parameter)
    if place is None or not place.owner.parts.params:
        raise AssertionError("safe_*_local_* work on ZeRO stage 3 parameters only; use the safe_*_full_* variants")
    return place


def _local_get(own: tuple[int, Tensor] | None) -> Tensor | None:
    return None if own is None else own[1].float()


def _local_set(own: tuple[int, Tensor] | None, value: Tensor) -> None:
    if own is not None:
        own[1].copy_(value.reshape(-1))


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """This rank's elements of the fp32 master, 1-D (none if another rank holds them all)."""
    place = _local_place(param)
    return _local_get(_own(place, _master(place)))


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """This rank's elements of the mean gradient, 1-D fp32."""
    place = _local_place(param)
    local = _local_get(_own(place, _grad(place)))
    return None if local is None else local * _grad_factor(place)


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """This rank's elements of an optimizer state, 1-D fp32."""
    place = _local_place(param)
    own = _own(place, _master(place))
    if own is not None and not own[1].numel():
        return own[1].float()
    return _local_get(_state(place, optim_state_key))


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Replace this rank's elements of the master; call it on every rank (the parameter is published)."""
    place = _local_place(param)
    _before_master_write(place)
    _local_set(_own(place, _master(place)), value)
    _after_master_write(place)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Replace this rank's elements of the mean gradient."""
    place = _local_place(param)
    own = _own(place, _grad(place))
    if own is not None:
        _local_set(own, value / _grad_factor(place))


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Replace this rank's elements of an optimizer state."""
    place = _local_place(param)
    place.owner.gate.wait()
    _local_set(_state(place, optim_state_key), value)


# -- leaf modules ------------------------------------------------------------------------------------------------


def _matches(module: nn.Module, kinds: Iterable[type[nn.Module] | str]) -> bool:
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__} | {type(module).__name__}
    return any(kind in names if isinstance(kind, str) else isinstance(module, kind) for kind in kinds)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type[nn.Module] | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark modules (by class or qualified class name) as units of their own; call it before sharding."""
    kinds = list(leaf_module_classes)
    found = [module for module in model.modules() if _matches(module, kinds)]
    if not found and raise_if_not_found:
        raise ValueError(f"no module of the classes {kinds} in {type(model).__name__}; check the class names")
    for module in found:
        module.__dict__["_z3_leaf"] = True
    return found


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[type[nn.Module] | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Undo `set_z3_leaf_modules`; ValueError when the model has none of these classes."""
    kinds = list(leaf_module_classes)
    matching = [module for module in model.modules() if _matches(module, kinds)]
    if not matching and raise_if_not_found:
        raise ValueError(f"no module of the classes {kinds} in {type(model).__name__}; check the class names")
    found = [module for module in matching if z3_leaf_module(module)]
    for module in found:
        module.__dict__["_z3_leaf"] = False
    return found


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that are marked."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether a module is marked as a unit of its own."""
    return bool(getattr(model, "_z3_leaf", False))


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Whether a parameter belongs to a marked module."""
    place = place_of(model)
    if place is None:
        return False
    return any(model is p for m in get_z3_leaf_modules(place.owner.module) for p in m.parameters())
