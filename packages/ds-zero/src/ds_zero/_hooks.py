"""When units are gathered and released during forward and backward (stage 3).

    forward of an owner   gather its units, run, release them again
    backward of an owner  its outputs' gradients arrive: gather its units, release those of the owner before it
    end of micro-batch    release whatever is still gathered

Three notes that explain the rest:

Note [Recompute]: activation checkpointing runs a forward inside backward. There the unit must stay gathered until the
backward of the same block is over, so a forward inside backward counts as the beginning of the owner's backward and
does not release; the release comes with the next owner's backward or with the end of the micro-batch. This covers
reentrant and non-reentrant checkpointing, frozen parameters included, without special cases.

Note [Strays]: a parameter may be read outside its owner's forward (torch's MultiheadAttention reads out_proj.weight,
tied heads read the embedding). Modules hold their parameters in a `WatchedParameters` dict; reading one whose owner
does not run, while another forward does, gathers its unit on the spot and keeps it until the end of the outermost
forward, and again for the whole backward. So does a module that returns a parameter: its caller will use it.

Note [Enclosing]: an owner that runs other owners inside its forward (a root with parameters of its own) may use its
parameters before, between and after them. Its units stay gathered until its own forward ends, even if an inner owner
shares them, and in backward from the arrival of its outputs' gradients to the end.

Note [Compiled]: torch.compile is given an owner's `forward`, so that the hooks run outside of what is compiled: a graph
finds its parameters gathered, and knows them as its inputs. While one is traced, reads are not reported: the hooks'
own state would become guards, and every block a recompilation. A compiled forward therefore has no strays; it uses the
parameters of its own owner and of those that are running.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ds_comm import Work
from ds_zero._unit import Unit, UnitStatus
from ds_zero.config import ZeroConfig
from ds_zero.errors import ZeroStateError
from ds_zero.trace import OrderHint

__all__ = ["GatherHooks", "WatchedParameters", "output_tensors"]


def output_tensors(value: Any) -> Iterator[Tensor]:
    """Tensors inside nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from output_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from output_tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from output_tensors(getattr(value, field.name))


def in_backward() -> bool:
    """Whether autograd is executing on this thread (a recompute, Note [Recompute])."""
    return bool(torch._C._current_graph_task_id() != -1)


def refuse_copy(name: str) -> NoReturn:
    """ZeroStateError: copy.deepcopy of a model of this class at stage 3."""
    raise ZeroStateError(
        f"copy.deepcopy of a {name} whose parameters are sharded (stage 3): the copy would have none of them; copy it"
        " before it is sharded, or load its gathered state dict into a new one"
    )


class _Forward:
    """A forward that is running: its owner's units, and whether other owners ran inside it (Note [Enclosing])."""

    __slots__ = ("encloses", "units")

    def __init__(self, units: list[Unit]) -> None:
        self.units = units
        self.encloses = False


class WatchedParameters(dict[str, Any]):
    """A module's `_parameters` that reports reads (Note [Strays])."""

    def __init__(self, values: dict[str, Any], on_read: Callable[[nn.Parameter], None]) -> None:
        super().__init__(values)
        self._on_read = on_read

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is not None and not is_dynamo_compiling():
            self._on_read(value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # copies and pickles of the module are ordinary modules


class GatherHooks:
    """Installs and serves the hooks of one model."""

    def __init__(
        self,
        model: nn.Module,
        owners: Sequence[tuple[nn.Module, list[Unit]]],
        unit_of: dict[nn.Parameter, Unit],
        config: ZeroConfig,
        begin_forward: Callable[[], None],
    ) -> None:
        self._config = config
        self._unit_of = unit_of
        self._units = list(dict.fromkeys(unit for _, units in owners for unit in units))
        self._running: list[_Forward] = []
        self._gathered_for_backward: list[Unit] = []
        self._strays: dict[Unit, None] = {}
        self._external: dict[nn.Module, dict[Unit, None]] = {}
        self._prefetched: dict[Unit, Work] = {}
        self._hints = {True: OrderHint(), False: OrderHint()}
        self._begin_forward = begin_forward
        self._by_index = {unit.layout.index: unit for unit in self._units}
        self._owned = {id(module): units for module, units in owners}
        self._handles: list[Any] = []
        self._watch(model)
        hooked = [module for module, _ in owners]
        if model not in hooked:
            hooked.insert(0, model)
        for module in hooked:
            self._handles.append(module.register_forward_pre_hook(self._before_forward, prepend=True))
            self._handles.append(module.register_forward_hook(self._after_forward, always_call=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        refuse_copy("module")

    def _watch(self, model: nn.Module) -> None:
        self._watched = [module for module in model.modules() if module._parameters]
        for module in self._watched:
            module.__dict__["_parameters"] = WatchedParameters(module._parameters, self._read)

    # -- forward -----------------------------------------------------------------------------------------------

    def _units_for(self, module: nn.Module) -> list[Unit]:
        return self._owned.get(id(module), []) + list(self._external.get(module, ()))

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self._running and not in_backward():
            self._begin_forward()
            self._hints[torch.is_grad_enabled()].restart()
        units = self._units_for(module)
        if units:
            for outer in self._running:
                outer.encloses = True
        self._running.append(_Forward(units))
        if in_backward():
            self._before_backward(units, [])
            return
        for unit in units:
            self._use(unit)
        self._prefetch()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        done = self._running.pop() if self._running else _Forward(self._units_for(module))
        outermost = not self._running and not in_backward()
        tensors = list(output_tensors(output))
        parameters = [t for t in tensors if isinstance(t, nn.Parameter)]
        returned = {unit for p in parameters if (unit := self._unit_of.get(p)) is not None}
        self._strays.update(dict.fromkeys(returned))
        if torch.is_grad_enabled() and (done.units or outermost):
            with_gradient = [t for t in tensors if t.grad_fn is not None]
            if with_gradient:
                strays = [*(done.units if done.encloses else ()), *(self._strays if outermost else ())]
                self._on_gradient(with_gradient, done.units, strays, releases=not done.encloses)
        if in_backward():
            return
        in_use = {unit for outer in self._running for unit in outer.units}
        for unit in done.units:
            if unit not in self._strays and unit not in in_use and not self._reused_soon(unit):
                unit.release()
        if outermost:
            for unit in self._strays:
                if unit not in returned:  # what the model itself returns stays until the micro-batch ends
                    unit.release()
            self._strays.clear()

    def _reused_soon(self, unit: Unit) -> bool:
        """Whether the hint says that the unit comes again within `max_reuse_distance` elements."""
        distance = 0
        if not self._config.max_reuse_distance:
            return False
        for index in self._hints[torch.is_grad_enabled()].upcoming():
            if index == unit.layout.index:
                return True
            distance += self._by_index[index].layout.numel
            if distance > self._config.max_reuse_distance:
                return False
        return False

    def _read(self, parameter: nn.Parameter) -> None:
        """A parameter is read (Note [Strays]); it may be gathered already, but on its way or about to be released."""
        if not self._running:
            return
        unit = self._unit_of.get(parameter)
        if unit is None or unit in self._strays or any(unit in forward.units for forward in self._running):
            return
        self._strays[unit] = None
        self._use(unit)

    def register_external(self, module: nn.Module, parameter: nn.Parameter) -> None:
        """Gather `parameter`'s unit for the forward and backward of `module` as well."""
        self._external.setdefault(module, {})[self._unit_of[parameter]] = None
        if id(module) not in self._owned:
            self._owned[id(module)] = []
            self._handles.append(module.register_forward_pre_hook(self._before_forward, prepend=True))
            self._handles.append(module.register_forward_hook(self._after_forward, always_call=True))

    def unregister_external(self, module: nn.Module, parameter: nn.Parameter) -> None:
        """Undo `register_external`."""
        self._external.get(module, {}).pop(self._unit_of[parameter], None)

    # -- backward ----------------------------------------------------------------------------------------------

    def _on_gradient(self, tensors: list[Tensor], units: list[Unit], strays: list[Unit], *, releases: bool) -> None:
        """When the first gradient of these outputs arrives, the backward of their owner begins."""

        def begin(_: Tensor) -> None:
            self._before_backward(units, strays, releases=releases)

        torch.autograd.graph.register_multi_grad_hook(tensors, begin, mode="any")

    def _before_backward(self, units: list[Unit], strays: list[Unit], *, releases: bool = True) -> None:
        keep = {*units, *strays, *self._strays, *(unit for forward in self._running for unit in forward.units)}
        if not releases:
            # An enclosing owner may return an inner owner's very output: that one's backward has begun just before.
            keep.update(self._gathered_for_backward)
        for unit in self._gathered_for_backward:
            if unit not in keep:
                unit.release()
        self._gathered_for_backward = [unit for unit in self._gathered_for_backward if unit in keep]
        self._strays.update(dict.fromkeys(strays))
        for unit in [*strays, *units]:
            self._use(unit)
        self._prefetch()

    def end_micro_batch(self) -> None:
        """Release everything that backward left gathered."""
        self._wait_prefetched(self._prefetched)
        self._strays.clear()
        self._gathered_for_backward.clear()
        self._running.clear()
        for unit in self._units:
            unit.release()

    # -- gathering ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def gathered(self, unit: Unit) -> Iterator[None]:
        """Have one unit gathered outside of forward and backward; afterwards it is as before."""
        before = unit.status
        if unit in self._prefetched:
            self._wait_prefetched([unit])
        unit.gather()
        try:
            yield
        finally:
            if before is UnitStatus.SHARDED:
                unit.release()

    def _use(self, unit: Unit) -> None:
        """Have the unit gathered now."""
        self._hints[torch.is_grad_enabled() or in_backward()].use(unit.layout.index)
        if unit in self._prefetched:
            self._wait_prefetched([unit])
        unit.gather()
        if in_backward() and unit not in self._gathered_for_backward:
            self._gathered_for_backward.append(unit)

    def _prefetch(self) -> None:
        """Start gathering the units that the hint expects next, within the size limits."""
        if not self._config.prefetch_bucket_size or not self._units or self._units[0].comm.kind in ("shm", "local"):
            return  # nothing is copied there, so there is nothing to start early
        live = sum(unit.layout.numel for unit in self._units if unit.storage.resident)
        ahead = 0
        for index in self._hints[torch.is_grad_enabled() or in_backward()].upcoming():
            unit = self._by_index[index]
            ahead += unit.layout.numel
            if ahead > self._config.prefetch_bucket_size or live + ahead > self._config.max_live_parameters:
                return
            if unit.status is UnitStatus.SHARDED:
                work = unit.gather(async_op=True)
                if work is not None:
                    self._prefetched[unit] = work

    def _wait_prefetched(self, units: Any) -> None:
        for unit in list(units):
            self._prefetched.pop(unit).wait()

    def close(self) -> None:
        """Remove all hooks; the modules get ordinary dicts back."""
        for handle in self._handles:
            handle.remove()
        for module in self._watched:
            module.__dict__["_parameters"] = dict(module._parameters)
