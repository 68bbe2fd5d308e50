"""The flops profiler: operations, multiply-adds, parameters and times of a model, module by module.

    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(batch).sum().backward()
    profiler.stop_profile()
    profiler.print_model_profile()
    profiler.end_profile()

or `get_model_profile(model, input_shape)` for one forward, or config section `flops_profiler` for one step of a run.

Vocabulary: *flops* are floating point operations, *MACs* multiply-adds (two flops each), FLOPS flops per second. What
is counted and what is not: `deepspeed.profiling.count`. Parameters count whole, also when ZeRO-3 has sharded them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ds_comm.device
from deepspeed.profiling.count import OperationCounter, Phase
from deepspeed.profiling.report import (
    ModuleProfile,
    aggregated_profile,
    detailed_profile,
    duration_to_string,
    flops_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
    summary_of,
)
from deepspeed.utils.logging import logger

__all__ = [
    "FlopsProfiler",
    "duration_to_string",
    "flops_to_string",
    "get_model_profile",
    "macs_to_string",
    "number_to_string",
    "params_to_string",
]


class FlopsProfiler:
    """Profiles what runs between `start_profile` and `stop_profile`.

    Args:
        model: any module; an engine's `module` for an engine.
        ds_engine: the engine around it, or None; its name appears in the report.
        recompute_fwd_factor: upstream's guess of what checkpointing recomputes. Has no effect: a forward that is run
            again is counted when it is.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.started = False
        self._counter = OperationCounter(model)
        self._begin = 0.0
        self._seconds = 0.0

    def start_profile(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Begin to count, from zero. Modules of the classes in `ignore_list` count nothing.

        Raises RuntimeError when counting already.
        """
        if self.started:
            raise RuntimeError("the flops profiler is running; stop_profile() it before start_profile()")
        self._counter = OperationCounter(self.model, ignore=ignore_list or ())
        self._seconds = 0.0
        self.started = True
        ds_comm.device.synchronize()
        self._begin = time.perf_counter()
        self._counter.__enter__()

    def stop_profile(self) -> None:
        """Stop counting; what was counted stays. Does nothing when not counting."""
        if not self.started:
            return
        self._counter.__exit__(None, None, None)
        ds_comm.device.synchronize()
        self._seconds = time.perf_counter() - self._begin
        self.started = False

    def reset_profile(self) -> None:
        """Forget what was counted."""
        if self.started:
            self.stop_profile()
        self._counter, self._seconds = OperationCounter(self.model), 0.0

    def end_profile(self) -> None:
        """Stop and forget."""
        self.reset_profile()

    # -- totals --------------------------------------------------------------------------------------------------

    def flops_of(self, phase: Phase) -> int:
        """Operations of the whole model in one phase: "forward", "backward" or "recompute"."""
        return sum(self._counter.flops[phase].values())

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Operations of the forwards (`flops_of` has the others)."""
        total = self.flops_of("forward")
        return flops_to_string(total) if as_string else total

    def get_total_macs(self, as_string: bool = False) -> int | str:
        """Multiply-adds of the forwards."""
        total = self.flops_of("forward") // 2
        return macs_to_string(total) if as_string else total

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds spent in the model's forwards."""
        total = self._counter.seconds[""]
        return duration_to_string(total) if as_string else total

    def get_total_params(self, as_string: bool = False) -> int | str:
        """Elements of all parameters, tied ones once."""
        total = self.profile()[""].params
        return params_to_string(total) if as_string else total

    def get_total_step_duration(self, as_string: bool = False) -> float | str:
        """Seconds between start and stop."""
        return duration_to_string(self._seconds) if as_string else self._seconds

    def profile(self) -> Mapping[str, ModuleProfile]:
        """What was counted, by module name ("" is the model), each with its children, in order of definition."""
        return {path: ModuleProfile.of(path, module, self._counter) for path, module in self.model.named_modules()}

    # -- reports -------------------------------------------------------------------------------------------------

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | Path | None = None,
    ) -> None:
        """Write the report to `output_file`, or log it.

        Args:
            profile_step: number for the headline.
            module_depth: depth of the per-depth table; -1 for all depths.
            top_modules: modules shown per depth.
            detailed: add the tree of all modules.
        """
        text = self.report(profile_step, module_depth, top_modules, detailed)
        if output_file is None:
            logger.info("\n%s", text)
            return
        path = Path(output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Log the heaviest module classes of each depth."""
        logger.info("\n%s", aggregated_profile(self.profile(), module_depth, top_modules))

    def report(self, profile_step: int = 1, module_depth: int = -1, top_modules: int = 1, detailed: bool = True) -> str:
        """The text that `print_model_profile` writes."""
        modules = self.profile()
        where = "" if self.ds_engine is None else f" of {type(self.ds_engine).__name__}"
        parts = [
            f"flops profile{where} at step {profile_step}",
            summary_of(modules[""], self._seconds),
            aggregated_profile(modules, module_depth, top_modules),
        ]
        if detailed:
            parts.append(detailed_profile(self.model, modules))
        return "\n\n".join(parts)


def get_model_profile(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | Path | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Profile one forward of `model` in eval mode, without gradients.

    Args:
        input_shape: shape of the one input, a tensor of ones in the dtype of the model; else give `args` and `kwargs`.
        warm_up: forwards before the one that counts.
        as_string: return "1.2 GFLOPS" and the like instead of numbers.
        mode: "forward" calls the model, "generate" its `generate`.
        The rest as `FlopsProfiler.print_model_profile` and `start_profile`.
    Returns:
        (flops, MACs, parameters)
    Raises:
        ValueError: no input, or both kinds of it; an unknown mode.
    """
    if mode not in ("forward", "generate"):
        raise ValueError(f"mode is {mode!r}; expected 'forward' or 'generate'")
    keywords = dict(kwargs or {})
    if (input_shape is None) == (not args and not keywords):
        raise ValueError("get_model_profile needs either input_shape, or args and kwargs of the model")
    inputs = list(args) if input_shape is None else [_ones(model, input_shape)]
    call = model if mode == "forward" else getattr(model, "generate")  # noqa: B009  (a module's attribute is no method)
    profiler = FlopsProfiler(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for _ in range(warm_up):
                call(*inputs, **keywords)
            profiler.start_profile(ignore_list=ignore_modules)
            stack.callback(profiler.stop_profile)
            call(*inputs, **keywords)
    finally:
        model.train(was_training)
    if print_profile:
        profiler.print_model_profile(1, module_depth, top_modules, detailed, output_file)
    return (
        profiler.get_total_flops(as_string),
        profiler.get_total_macs(as_string),
        profiler.get_total_params(as_string),
    )


def _ones(model: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return torch.ones(
        tuple(shape),
        dtype=first.dtype if first is not None else torch.get_default_dtype(),
        device=first.device if first is not None else ds_comm.device.current_device(),
    )
