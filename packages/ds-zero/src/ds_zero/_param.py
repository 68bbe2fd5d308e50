"""ZeRO-3 parameter objects: the attributes that clients of upstream read (`ds_id`, `ds_shape`, `ds_status`, ...).

A parameter under zero.Init or stage 3 keeps its identity but changes its class:

    ZeroParameter       its data is there (gathered)
    ReleasedParameter   its data is an empty placeholder; an in-place write to it would be lost, so it raises, or,
                        inside zero.Init, is carried out on the gathered parameter (model initialisation code)

Where the values live is the record's `home`: a slice of its own (zero.Init, before shard()) or a unit.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_comm import Communicator
from ds_zero.errors import ZeroStateError

__all__ = [
    "Home",
    "ParamRecord",
    "ReleasedParameter",
    "ZeroParamStatus",
    "ZeroParamType",
    "ZeroParameter",
    "adopt",
    "mark_gathered",
    "mark_released",
    "record_of",
]

_ids = itertools.count()


class ZeroParamStatus(enum.Enum):
    """Upstream's names for where a parameter is."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ZeroParamType(enum.Enum):
    """Upstream's names for what a parameter is."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class Home(Protocol):
    """Where one sharded parameter's values live. `fetch` and `store` are collectives over `comm`."""

    comm: Communicator

    @property
    def available(self) -> bool:
        """Whether `param.data` is the full value now."""

    @property
    def shard(self) -> Tensor:
        """1-D: the elements that this rank owns (may be none)."""

    def fetch(self) -> Tensor:
        """A private 1-D copy of the whole value."""

    def store(self, value: Tensor) -> None:
        """Replace the value; every rank passes the same 1-D tensor."""

    def hold(self, held: bool) -> None:
        """Tell whether GatheredParameters owns `param.data` from now on."""

    def restore(self, parameter: nn.Parameter) -> None:
        """Set `param.data` to what it is outside GatheredParameters."""


class ParamRecord:
    """What is known of one sharded parameter."""

    def __init__(self, shape: torch.Size, home: Home) -> None:
        self.id = next(_ids)
        self.shape = shape
        self.home = home
        self.held = False
        self.active_sub_modules: set[int] = set()
        self.write_through: Callable[[], bool] = bool
        """Whether a write to the released parameter is carried out (inside zero.Init) or refused (`bool()`: False)."""
        self.register_external: Callable[[nn.Module, nn.Parameter, bool], None] | None = None
        """Set once the model is sharded: (module, parameter, add or remove)."""


def record_of(parameter: Tensor) -> ParamRecord | None:
    """The record of a sharded parameter; None for an ordinary tensor."""
    return parameter.__dict__.get("_zero_record") if isinstance(parameter, nn.Parameter) else None


class ZeroParameter(nn.Parameter):
    """A parameter that knows its shard. Created by changing the class of an existing Parameter (`adopt`)."""

    _zero_record: ParamRecord

    @property
    def ds_id(self) -> int:
        return self._zero_record.id

    @property
    def ds_shape(self) -> torch.Size:
        return self._zero_record.shape

    @property
    def ds_numel(self) -> int:
        return self._zero_record.shape.numel()

    @property
    def ds_status(self) -> ZeroParamStatus:
        record = self._zero_record
        return ZeroParamStatus.AVAILABLE if record.held or record.home.available else ZeroParamStatus.NOT_AVAILABLE

    @property
    def ds_param_type(self) -> ZeroParamType:
        return ZeroParamType.PARTITIONED

    @property
    def ds_tensor(self) -> Tensor:
        return self._zero_record.home.shard

    @property
    def ds_process_group(self) -> Any:
        return self._zero_record.home.comm.group

    @property
    def ds_zero_partition_rank(self) -> int:
        return self._zero_record.home.comm.rank

    @property
    def ds_zero_partition_world_size(self) -> int:
        return self._zero_record.home.comm.size

    @property
    def ds_active_sub_modules(self) -> set[int]:
        return self._zero_record.active_sub_modules

    def partition_numel(self) -> int:
        """Elements per rank, rounded up: upstream's equal split of each parameter."""
        return -(-self.ds_numel // self._zero_record.home.comm.size)

    def aligned_size(self) -> int:
        """Elements of all ranks' shares together, padding included."""
        return self.partition_numel() * self._zero_record.home.comm.size

    def padding_size(self) -> int:
        """Elements of padding in `aligned_size`."""
        return self.aligned_size() - self.ds_numel

    def all_gather(
        self, param_list: list[nn.Parameter] | None = None, async_op: bool = False, hierarchy: int = 0
    ) -> None:
        """Make the full values available until `partition` (collective)."""
        for parameter in param_list or [self]:
            hold(parameter)

    def partition(
        self,
        param_list: list[nn.Parameter] | None = None,
        hierarchy: int = 0,
        has_been_updated: bool = False,
        free_data: bool = True,
    ) -> None:
        """Undo `all_gather`; with `has_been_updated` the present values are kept (same on every rank; collective)."""
        for parameter in param_list or [self]:
            let_go(parameter, keep=has_been_updated)

    def ds_summary(self) -> dict[str, Any]:
        """The facts a debugger wants."""
        return {"id": self.ds_id, "status": self.ds_status.name, "numel": self.ds_numel, "shape": tuple(self.ds_shape)}


class ReleasedParameter(ZeroParameter):
    """The same with its data released: reads see an empty tensor, in-place writes do not pass silently."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            target = _target(args, kwargs)
            if isinstance(target, ReleasedParameter):
                if _writes(func):
                    return _write(target, func, args, kwargs or {})
                if func in _ALIASING:  # `p.data.normal_()` is a write as well
                    alias = func(*args, **(kwargs or {})).as_subclass(ReleasedData)
                    alias._parameter = target
                    return alias
            return func(*args, **(kwargs or {}))


class ReleasedData(Tensor):
    """`released.data`: an empty tensor that knows whose; in-place writes to it are writes to the parameter."""

    _parameter: ReleasedParameter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            target = _target(args, kwargs)
            if isinstance(target, ReleasedData) and _writes(func):
                parameter = target._parameter
                if not isinstance(parameter, ReleasedParameter):
                    raise ZeroStateError(
                        f"{func.__name__} on `.data` that was taken while the parameter was released; take it anew"
                    )
                swap = {"tensor": parameter} if not args else {}
                _write(parameter, func, (parameter, *args[1:]) if args else (), {**(kwargs or {}), **swap})
                return target
            return func(*args, **(kwargs or {}))


HARMLESS = frozenset({"requires_grad_", "retain_grad", "register_hook", "share_memory_", "rename_"})
OPERATORS = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__"})
_ALIASING = (Tensor.data.__get__, Tensor.detach)  # type: ignore[attr-defined]


def _target(args: Any, kwargs: Any) -> Any:
    """What a call works on; the functions of torch.nn.init come with keywords only."""
    return args[0] if args else (kwargs or {}).get("tensor")


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in OPERATORS or (name.endswith("_") and not name.endswith("__") and name not in HARMLESS)


def _write(target: ReleasedParameter, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An in-place write to a released parameter: on the gathered values inside zero.Init, else refused."""
    record = target._zero_record
    if not record.write_through():
        raise ZeroStateError(
            f"{func.__name__} on a sharded parameter of shape {tuple(record.shape)} whose values are not here;"
            " wrap the code in zero.GatheredParameters(params, modifier_rank=0)"
        )
    hold(target)
    try:
        with torch.no_grad():
            return func(*args, **kwargs)
    finally:
        let_go(target, keep=True, source=0)


def adopt(parameter: nn.Parameter, shape: torch.Size, home: Home) -> ParamRecord:
    """Give a parameter a (new) home; its class becomes one of the two above with the next mark."""
    record = record_of(parameter)
    if record is None:
        record = ParamRecord(shape, home)
        parameter.__dict__["_zero_record"] = record
    record.home = home
    return record


def mark_gathered(parameter: nn.Parameter) -> None:
    """The data is there from now on."""
    if record_of(parameter) is not None:
        parameter.__class__ = ZeroParameter


def mark_released(parameter: nn.Parameter) -> None:
    """The data is a placeholder from now on."""
    if record_of(parameter) is not None:
        parameter.__class__ = ReleasedParameter


def hold(parameter: Tensor) -> bool:
    """Give a sharded parameter a private full copy; False (and nothing is done) if it has its data already."""
    record = record_of(parameter)
    if record is None or record.held:
        return False
    value = record.home.fetch()
    record.held = True
    record.home.hold(True)
    mark_gathered(parameter)  # type: ignore[arg-type]
    parameter.data = value.view(record.shape)
    return True


def let_go(parameter: Tensor, *, keep: bool, source: int | None = None) -> None:
    """End `hold`: keep the present values (those of group rank `source` if given) or drop them."""
    record = record_of(parameter)
    if record is None or not record.held:
        return
    home = record.home
    if keep:
        if parameter.data.numel() != record.shape.numel():
            raise ZeroStateError(
                f"a gathered parameter of shape {tuple(record.shape)} was left with shape"
                f" {tuple(parameter.shape)}; keep its shape"
            )
        value = parameter.data.detach().reshape(-1).contiguous()
        if source is not None:
            home.comm.broadcast(value, source, label="gathered parameter")
        home.store(value)
    record.held = False
    home.hold(False)
    home.restore(parameter)  # type: ignore[arg-type]
