"""`engine.compile()`: torch.compile of a model's blocks, ZeRO's communication staying outside of what is compiled.

Only `forward` of each block (`ds_zero.block_modules`) is compiled, in place: the hooks that gather its unit before and
release it after run around the compiled graph, those that reduce its gradients run after the compiled backward. So a
graph has no breaks but those of the model's own code, is the same under every ZeRO stage, and names of parameters and
of checkpoints stay as they are. Blocks of one class share one compilation, because their parameters are its inputs.

A model without blocks is compiled as a whole below stage 3, where nothing is gathered inside of it.

Not compiled: what is outside of the blocks (embedding, head, loss), and calls that are given a cache of keys and
values, which `generate` fills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.block_forward import block_forward, restore_forward
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.utils.logging import log_dist, logger
from ds_zero import block_modules

__all__ = ["CompiledModel", "compile_model", "refuse_compile_pass"]

Function = Callable[..., Any]


class CompiledModel:
    """What `engine.compile` has done.

    Attributes:
        names: the compiled modules, as in `model.named_modules()` ("" is the model itself).
    """

    def __init__(self, modules: Mapping[str, nn.Module], backend: str | Function, options: dict[str, Any]) -> None:
        self.names = tuple(modules)
        self._modules = list(modules.values())
        self._backend = backend
        self._options = options
        self._functions: dict[Function, Function] = {}
        self._before = _seconds_compiling()
        _leave_alone("ds_comm")
        for module in self._modules:
            forward = block_forward(module)
            forward.compiler = self._compiled
            forward.compiles_checkpoints = backend != "eager"  # which draws dropout anew when it recomputes

    def _compiled(self, function: Function) -> Function:
        if function not in self._functions:
            self._functions[function] = torch.compile(function, backend=self._backend, **self._options)
        return self._functions[function]

    @property
    def seconds(self) -> float:
        """Time that this process has compiled for since `engine.compile` (torch counts it for all models together)."""
        return _seconds_compiling() - self._before

    def close(self) -> None:
        """Give the modules their own forward back."""
        for module in self._modules:
            block_forward(module).compiler = None
            restore_forward(module)


def _leave_alone(package: str) -> None:
    """Let Python make the calls into a package, between graphs: tensor-parallel blocks hold collectives."""
    from torch._dynamo import trace_rules

    trace_rules.add(package)


def _seconds_compiling() -> float:
    from torch._dynamo.utils import calculate_time_spent  # a second to import, so only for those who compile

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def compile_model(
    model: nn.Module,
    units: Any,
    *,
    gathers: bool,
    splits_backward: bool,
    backend: str | Function | None,
    compile_kwargs: Mapping[str, Any] | None,
    schedule: Any,
    compiled_autograd_enabled: bool,
) -> CompiledModel:
    """Compile the blocks of a model in place.

    Args:
        units: what `ds_zero.shard` was given as units.
        gathers: parameters are gathered inside of the model (stage 3).
        splits_backward: a pipeline schedule runs the two halves of a backward apart (zb_h1, zb_v).
        backend: as torch.compile's; None: the accelerator's default.
        compile_kwargs: further arguments of torch.compile (`mode`, `dynamic`, `fullgraph`, `options`).
    Raises:
        DeepSpeedConfigError: an argument of upstream's compiler passes, or an unknown backend.
    """
    if splits_backward:
        raise DeepSpeedConfigError(
            "engine.compile() with a pipeline schedule that runs the two halves of a backward apart (zb_h1, zb_v); a"
            " compiled backward is one graph. Set pipeline.schedule to 1f1b, gpipe or interleaved, or do not compile"
        )
    options = dict(compile_kwargs or {})
    if "backend" in options:
        raise DeepSpeedConfigError(
            f"engine.compile(compile_kwargs=...) holds backend {options['backend']!r}; give it as"
            " engine.compile(backend=...)"
        )
    if schedule:
        raise DeepSpeedConfigError(
            "engine.compile(schedule=...) is for upstream's compiler passes, which do not exist here: ZeRO's hooks"
            " gather and reduce around the compiled blocks; leave it out"
        )
    if compiled_autograd_enabled:
        raise DeepSpeedConfigError(
            "engine.compile(compiled_autograd_enabled=True) is not supported: compiled autograd would trace the hooks"
            " that gather and reduce; leave it out, the backward of each block is compiled with its forward"
        )
    backend = get_accelerator().get_compile_backend() if backend is None else backend
    known = torch.compiler.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        raise DeepSpeedConfigError(f"engine.compile(backend={backend!r}): torch.compile knows {', '.join(known)}")
    modules = block_modules(model, units)
    if not modules and not gathers:
        modules = {"": model}
    if not modules:
        logger.warning(
            "engine.compile(): %s has no repeated blocks, and at stage 3 a model is not compiled across what is"
            " gathered; nothing is compiled. Name blocks with deepspeed.utils.set_z3_leaf_modules(model, [Class])"
            " before initialize, or use stage 2",
            type(model).__name__,
        )
    name = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
    log_dist(f"engine.compile(): {len(modules)} blocks with backend {name}; compiled when first called", ranks=[0])
    return CompiledModel(modules, backend, options)


def refuse_compile_pass(name: str) -> None:
    """DeepSpeedConfigError: upstream's compiler passes do not exist here."""
    raise DeepSpeedConfigError(
        f"register_compile_pass({name!r}): passes of upstream's compiler do not exist here; give"
        " engine.compile(backend=<function of (graph module, example inputs)>), which may change each block's graph"
    )
