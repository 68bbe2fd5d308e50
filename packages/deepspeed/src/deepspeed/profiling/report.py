"""The texts of the flops profiler: numbers with units, the summary, the heaviest modules per depth, the module tree."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from deepspeed.profiling.count import OperationCounter

__all__ = [
    "ModuleProfile",
    "aggregated_profile",
    "detailed_profile",
    "duration_to_string",
    "flops_to_string",
    "macs_to_string",
    "number_to_string",
    "params_to_string",
    "summary_of",
]

_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3), ("", 1.0), ("m", 1e-3), ("u", 1e-6))


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 G": the number in the largest unit that leaves at least one, or in `units` ("G", "M", "", "m", ...)."""
    scales = dict(_UNITS)
    if units is None:
        small = "" if isinstance(num, int) else "u"  # half an operation is nothing, half a second is 500 ms
        units = next((name for name, scale in _UNITS if abs(num) >= scale or name == small), "")
        units = units if num else ""
    return f"{round(num / scales[units], precision):g} {units}"


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 GFLOPS" (operations, or operations per second)."""
    return number_to_string(int(flops), units, precision) + "FLOPS"


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 GMACs"."""
    return number_to_string(int(macs), units, precision) + "MACs"


def params_to_string(params_num: int, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 M"."""
    return number_to_string(int(params_num), units, precision).rstrip()


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """ "1.23 ms", of seconds."""
    return number_to_string(float(duration), units, precision) + "s"


@dataclass(frozen=True)
class ModuleProfile:
    """What one module and all modules inside it did."""

    path: str
    kind: str
    """Name of the module's class."""
    params: int
    forward: int
    """Operations of its forwards."""
    backward: int
    recompute: int
    seconds: float
    """Time in its forwards."""
    calls: int

    @staticmethod
    def of(path: str, module: nn.Module, counter: OperationCounter) -> ModuleProfile:
        """The sums over a module and its children."""
        inside = f"{path}." if path else ""

        def total(counts: Mapping[str, int]) -> int:
            return sum(n for name, n in counts.items() if name == path or name.startswith(inside))

        return ModuleProfile(
            path,
            type(module).__name__,
            sum(int(getattr(p, "ds_numel", p.numel())) for p in set(module.parameters())),
            total(counter.flops["forward"]),
            total(counter.flops["backward"]),
            total(counter.flops["recompute"]),
            counter.seconds[path],
            counter.calls[path],
        )

    @property
    def depth(self) -> int:
        """0 for the model, 1 for its children, ..."""
        return self.path.count(".") + 1 if self.path else 0

    def text(self, whole: ModuleProfile) -> str:
        """One line, with shares of the whole model."""
        parts = [f"{params_to_string(self.params)} params", f"{macs_to_string(self.forward // 2)}"]
        if whole.forward:
            parts[-1] += f" ({self.forward / whole.forward:.1%})"
        if whole.backward:
            parts.append(f"backward {flops_to_string(self.backward + self.recompute)}")
        if self.calls:
            share = f" ({self.seconds / whole.seconds:.1%})" if whole.seconds else ""
            parts.append(f"{duration_to_string(self.seconds)}{share}")
            if self.forward and self.seconds:
                parts.append(f"{flops_to_string(self.forward / self.seconds)}")
        return ", ".join(parts)


def summary_of(model: ModuleProfile, seconds: float) -> str:
    """The totals; `seconds` is the time between start and stop."""
    rows = [
        ("parameters", params_to_string(model.params)),
        ("forward multiply-adds", macs_to_string(model.forward // 2)),
        ("forward operations", flops_to_string(model.forward)),
        ("forward time", duration_to_string(model.seconds)),
    ]
    if model.seconds:
        rows.append(("forward operations per second", flops_to_string(model.forward / model.seconds)))
    if model.backward:
        rows.append(("backward operations", flops_to_string(model.backward)))
        if model.recompute:
            rows.append(("recomputed operations", flops_to_string(model.recompute)))
        rows.append(("time from start to stop", duration_to_string(seconds)))
        done = model.forward + model.backward + model.recompute
        rows.append(("operations per second", flops_to_string(done / seconds) if seconds else "-"))
    return "\n".join(f"{name + ':':<32}{value}" for name, value in rows)


_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("params", lambda value: params_to_string(int(value))),
    ("MACs", macs_to_string),
    ("time", duration_to_string),
)


def aggregated_profile(modules: Mapping[str, ModuleProfile], module_depth: int = -1, top_modules: int = 1) -> str:
    """The `top_modules` heaviest module classes of each depth (or of one depth), by parameters, MACs and time."""
    depths: dict[int, dict[str, list[float]]] = {}
    for module in modules.values():
        row = depths.setdefault(module.depth, collections.defaultdict(lambda: [0.0, 0.0, 0.0]))[module.kind]
        for index, value in enumerate((module.params, module.forward // 2, module.seconds)):
            row[index] += value
    deepest = max(depths)
    lines = [f"the {top_modules} heaviest module classes per depth"]
    for depth in range(deepest + 1) if module_depth == -1 else [min(module_depth, deepest)]:
        lines.append(f"depth {depth}:")
        for index, (name, text) in enumerate(_COLUMNS):
            ranked = sorted(((row[index], kind) for kind, row in depths[depth].items()), reverse=True)[:top_modules]
            lines.append(f"    {name:<8}{', '.join(f'{kind} {text(value)}' for value, kind in ranked)}")
    return "\n".join(lines)


def detailed_profile(model: nn.Module, modules: Mapping[str, ModuleProfile]) -> str:
    """The tree of modules, each with parameters, MACs, backward operations, time and speed; inclusive of children."""
    whole = modules[""]
    lines = ["each module with its parameters, multiply-adds, operations and times, those of its children included"]
    for path, module in modules.items():
        name = f"({path.rpartition('.')[2]}) " if path else ""
        lines.append(f"{'  ' * module.depth}{name}{module.kind}: {module.text(whole)}")
    return "\n".join(lines)
