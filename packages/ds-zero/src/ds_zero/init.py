"""zero.Init: build a model whose parameters are sharded as soon as each module's constructor is done.

Every rank runs the same constructors; when the outermost `__init__` of a module returns, the parameters that the
module holds itself are cut into equal slices (rank 0's values count) and their full memory is freed. Peak memory per
rank is the own slices plus the parameters of one module. Constructors run in the dtype they ask for and the result is
cast, so a model built here equals one built plainly and cast.

In-place writes to already sharded parameters (`_init_weights` of a parent, torch.nn.init) are carried out on the
gathered parameter and rank 0's result is kept, for as long as a context is open.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

import ds_comm
from ds_comm import Communicator
from ds_zero._param import adopt, hold, let_go, mark_released, record_of
from ds_zero.config import ZeroConfig
from ds_zero.errors import LayoutError, ZeroStateError
from ds_zero.precision import DTYPES

__all__ = [
    "GatheredParameters",
    "Init",
    "SliceHome",
    "register_external_parameter",
    "unregister_external_parameter",
]

_active: list[Init] = []
"""Open contexts, outermost first. Constructing modules is process-wide by nature: nn.Module itself is patched."""


class SliceHome:
    """A parameter cut into equal slices, one per rank (before its unit is known)."""

    def __init__(self, value: Tensor, comm: Communicator) -> None:
        self.comm = comm
        self._numel = value.numel()
        self._slice_numel = -(-self._numel // comm.size)
        self._slice = torch.zeros(self._slice_numel, dtype=value.dtype, device=value.device)
        self.store(value.reshape(-1))

    @property
    def available(self) -> bool:
        return False

    @property
    def shard(self) -> Tensor:
        return self._slice

    def fetch(self) -> Tensor:
        out = torch.empty(self._slice_numel * self.comm.size, dtype=self._slice.dtype, device=self._slice.device)
        self.comm.all_gather_into(out, self._slice, label="zero.Init parameter")
        return out[: self._numel]

    def store(self, value: Tensor) -> None:
        start = self.comm.rank * self._slice_numel
        mine = value[start : start + self._slice_numel]
        self._slice[: mine.numel()].copy_(mine)

    def hold(self, held: bool) -> None:
        return None

    def restore(self, parameter: nn.Parameter) -> None:
        parameter.data = torch.empty(0, dtype=self._slice.dtype, device=self._slice.device)
        mark_released(parameter)


class Init:
    """Context (or, with `module=`, a call) that shards parameters as modules are built.

    Args:
        module: shard this finished module's parameters at once.
        group: ranks that share the parameters (None: all).
        config: ZeroConfig or dict; its `dtype` is what floating parameters are cast to.
        dtype: overrides the config's dtype.
        enabled: False makes everything a no-op.
    Raises:
        LayoutError: `dtype` is not a floating dtype.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        *,
        group: Any = None,
        config: ZeroConfig | dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        settings = config if isinstance(config, ZeroConfig) else ZeroConfig(**(config or {}))
        if dtype is not None and not dtype.is_floating_point:
            raise LayoutError(f"zero.Init: dtype is {dtype}; expected a floating dtype such as torch.bfloat16")
        self.dtype = dtype if dtype is not None else (DTYPES[settings.dtype] if settings.dtype else None)
        ds_comm.init_distributed()
        self.comm = ds_comm.communicator(group)
        self._depths: dict[int, int] = {}
        self._undo: list[Callable[[], None]] = []
        if module is not None:
            for child in module.modules():
                self._convert(child)

    # -- the context -------------------------------------------------------------------------------------------

    def __enter__(self) -> Init:
        if self.enabled:
            if not _active:
                self._patch_constructors()
            _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        _active.remove(self)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _patch_constructors(self) -> None:
        """Wrap `__init__` of every nn.Module subclass that exists, and of those that come while the context is open."""
        for cls in _subclasses(nn.Module):
            self._wrap(cls)
        original = nn.Module.__dict__.get("__init_subclass__")

        def init_subclass(cls: type[nn.Module], /, **kwargs: Any) -> None:
            super(nn.Module, cls).__init_subclass__(**kwargs)
            self._wrap(cls)

        nn.Module.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]

        def restore() -> None:
            if original is None:
                del nn.Module.__init_subclass__
            else:
                nn.Module.__init_subclass__ = original  # type: ignore[method-assign]

        self._undo.append(restore)
        plain_apply = nn.Module.apply

        def apply(module: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
            """As torch's, with each module's own parameters gathered; rank 0's result counts."""
            for child in module.children():
                child.apply(fn)
            with GatheredParameters(module.parameters(recurse=False), modifier_rank=0):
                fn(module)
            return module

        nn.Module.apply = apply  # type: ignore[method-assign,assignment]
        self._undo.append(functools.partial(setattr, nn.Module, "apply", plain_apply))
        self._patch_init_functions()

    def _patch_init_functions(self) -> None:
        """torch.nn.init looks at shapes before it writes: give it the gathered parameter."""
        for name, plain in list(vars(nn.init).items()):
            if not name.endswith("_") or name.startswith("_") or not callable(plain):
                continue

            @functools.wraps(plain)
            def gathered(tensor: Tensor, *args: Any, _plain: Callable[..., Tensor] = plain, **kwargs: Any) -> Tensor:
                with GatheredParameters(tensor, modifier_rank=0):
                    return _plain(tensor, *args, **kwargs)

            setattr(nn.init, name, gathered)
            self._undo.append(functools.partial(setattr, nn.init, name, plain))

    def _wrap(self, cls: type[nn.Module]) -> None:
        plain = cls.__dict__.get("__init__")
        if plain is None:
            return

        @functools.wraps(plain)
        def constructor(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            key = id(module)
            self._depths[key] = self._depths.get(key, 0) + 1
            try:
                plain(module, *args, **kwargs)
            finally:
                self._depths[key] -= 1
                outermost = not self._depths[key]
                if outermost:
                    del self._depths[key]
            if outermost:
                _active[-1]._convert(module)

        setattr(cls, "__init__", constructor)  # noqa: B010  # a method is not assigned to, for a type checker
        self._undo.append(functools.partial(setattr, cls, "__init__", plain))

    # -- conversion --------------------------------------------------------------------------------------------

    def _convert(self, module: nn.Module) -> None:
        """Shard the parameters that `module` holds itself; meta parameters wait until they are materialised."""
        for parameter in module.__dict__.get("_parameters", {}).values():
            if parameter is None or record_of(parameter) is not None or parameter.device.type == "meta":
                continue
            value = parameter.data
            if self.dtype is not None and value.is_floating_point():
                value = value.to(self.dtype)
            if self.comm.size > 1:
                value = value.contiguous()
                self.comm.broadcast(value, 0, label="zero.Init parameter")
            home = SliceHome(value, self.comm)
            record = adopt(parameter, value.shape, home)
            record.write_through = lambda: bool(_active)
            home.restore(parameter)


def _subclasses(cls: type[Any]) -> Iterable[type[Any]]:
    found: dict[type[Any], None] = {}
    pending = [cls]
    while pending:
        for child in pending.pop().__subclasses__():
            if child not in found:
                found[child] = None
                pending.append(child)
    return found


class GatheredParameters:
    """Context in which the listed sharded parameters hold their full values on every rank (collective).

    Args:
        params: a parameter, or any iterable of tensors; ordinary tensors are ignored, duplicates taken once, and
            parameters that an outer context already holds are left to it without any communication.
        modifier_rank: group rank whose values are kept on exit; None: nothing is kept, and writing is an error.
        fwd_module: also register the parameters as external to this module.
        enabled: False makes it a no-op.
    Raises:
        ZeroStateError: on exit, if a parameter was written although `modifier_rank` is None, or moved, or reshaped.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        listed = [params] if isinstance(params, Tensor) else list(params)
        records = {record.id: p for p in listed if enabled and (record := record_of(p)) is not None}
        self._parameters = [records[key] for key in sorted(records)]
        self._modifier_rank = modifier_rank
        self._held: list[tuple[Tensor, int, torch.device]] = []
        if fwd_module is not None:
            for parameter in self._parameters:
                register_external_parameter(fwd_module, parameter)

    def __enter__(self) -> None:
        for parameter in self._parameters:
            if hold(parameter):
                self._held.append((parameter, parameter._version, parameter.device))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        keep = self._modifier_rank is not None and error is None
        wrong = []
        for parameter, version, device in self._held:
            record = record_of(parameter)
            assert record is not None
            moved = parameter.shape != record.shape or parameter.device != device
            if moved:
                wrong.append(
                    f"one of shape {tuple(record.shape)} on {device} was left as {tuple(parameter.shape)} on"
                    f" {parameter.device}; keep its shape and device"
                )
            elif self._modifier_rank is None and parameter._version != version:
                wrong.append(
                    f"one of shape {tuple(record.shape)} was written although modifier_rank is None, which keeps"
                    " nothing; pass modifier_rank=0 and write on that rank"
                )
            let_go(parameter, keep=keep and not moved, source=self._modifier_rank)
        self._held.clear()
        if wrong and error is None:
            raise ZeroStateError(f"GatheredParameters: {len(wrong)} parameters were changed unduly: {wrong[0]}")


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Have `parameter` gathered for the forward and backward of `module`, which uses but does not own it.

    Reading an attribute such as `self.embed.weight` needs no registration; other ways of holding a parameter do.
    Raises RuntimeError (ZeroStateError) if it is no Parameter.
    """
    _external(module, parameter, add=True)


def unregister_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Undo `register_external_parameter`."""
    _external(module, parameter, add=False)


def _external(module: nn.Module, parameter: Tensor, *, add: bool) -> None:
    if not isinstance(parameter, nn.Parameter):
        raise ZeroStateError(
            f"register_external_parameter expects a torch.nn.Parameter, got {type(parameter).__name__}"
        )
    listed: dict[nn.Parameter, None] = module.__dict__.setdefault("_zero_external", {})
    if add:
        listed[parameter] = None
    else:
        listed.pop(parameter, None)
    record = record_of(parameter)
    if record is not None and record.register_external is not None:
        record.register_external(module, parameter, add)
