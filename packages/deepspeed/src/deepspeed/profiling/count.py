"""Floating point operations of a model's forwards and backwards, by module.

Owns `OperationCounter`, which sees every kernel that torch runs (a dispatch mode) and counts those that multiply
matrices: products, convolutions, attention. The formulas are torch's own (`torch.utils.flop_counter`), with those for
attention on a CPU that its registry lacks. One multiply-add is two operations; elementwise work counts nothing.

Vocabulary
    path      the name of a module inside the profiled model; "" is the model itself.
    forward   run by a module outside of any backward; recompute is a forward run again inside one (checkpointing).
    backward  run by autograd. Each node of the graph has a sequence number, which grows as forward makes nodes; a
              number therefore says which module was running when its node was made, and its backward is that module's.

Invariants: counts are per innermost module; what runs outside of the model (loss, optimizer, data) is not counted;
shapes alone decide, so the count on the meta device is that of a real run.
"""

from __future__ import annotations

import bisect
import collections
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

import ds_comm.device

__all__ = ["OperationCounter", "Phase"]

Phase = Literal["forward", "backward", "recompute"]

aten = torch.ops.aten


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
}


class _Kernels(TorchDispatchMode):
    """Hands every counted kernel to `count(operations)`, and runs all of them."""

    def __init__(self, count: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is None:
            if isinstance(func, torch._ops.OpOverload):
                with self:  # an op that consists of others, which inference mode does not take apart
                    parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._count(int(formula(*args, **kwargs, out_val=result)))
        return result


class OperationCounter:
    """Counts while it is entered; `flops[phase][path]` and `seconds[path]` are what it found.

    Args:
        model: the profiled model; its submodules are watched under their names.
        ignore: module classes whose own operations (and those of modules inside them) are left out.
        timed: also add up the time that each module's forwards take (the device is synchronised around each).
    """

    def __init__(self, model: nn.Module, *, ignore: Sequence[type[nn.Module]] = (), timed: bool = True) -> None:
        self.model = model
        self.flops: dict[Phase, collections.Counter[str]] = {
            "forward": collections.Counter(),
            "backward": collections.Counter(),
            "recompute": collections.Counter(),
        }
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.calls: collections.Counter[str] = collections.Counter()
        self._ignored = tuple(ignore)
        self._timed = timed
        self._stack: list[tuple[str | None, float]] = []
        self._changes: list[int] = []
        """Sequence numbers at which the running module changed, ascending; `_running` says to which."""
        self._running: list[str | None] = []
        self._handles: list[RemovableHandle] = []
        self._kernels = _Kernels(self._count)

    def __enter__(self) -> OperationCounter:
        self._changes, self._running = [0], [None]
        for path, module in self.model.named_modules():
            self._watch(path, module)
        self._kernels.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        self._kernels.__exit__(*details)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def _watch(self, path: str, module: nn.Module) -> None:
        ignored = isinstance(module, self._ignored)

        def enter(_: nn.Module, args: Any) -> None:
            self.calls[path] += 1
            inside_ignored = bool(self._stack) and self._stack[-1][0] is None
            self._stack.append((None if ignored or inside_ignored else path, self._now()))
            self._note(self._stack[-1][0])

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            if not self._stack:  # counting began inside this forward
                return
            begin = self._stack.pop()[1]
            self.seconds[path] += self._now() - begin
            self._note(self._stack[-1][0] if self._stack else None)

        self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def _now(self) -> float:
        if not self._timed:
            return 0.0
        ds_comm.device.synchronize()
        return time.perf_counter()

    def _note(self, path: str | None) -> None:
        self._changes.append(torch._C._autograd._get_sequence_nr())
        self._running.append(path)

    def _count(self, operations: int) -> None:
        phase, path = self._owner()
        if path is not None:
            self.flops[phase][path] += operations

    def _owner(self) -> tuple[Phase, str | None]:
        node: torch.autograd.graph.Node | None = torch._C._current_autograd_node()
        if self._stack:
            return "forward" if node is None else "recompute", self._stack[-1][0]
        if node is None:
            return "forward", None
        return "backward", self._running[bisect.bisect_right(self._changes, node._sequence_nr()) - 1]
