"""Helpers that scripts and frameworks import from `deepspeed.runtime.utils`.

Moving nested batches, norms and clipping of ordinary (unsharded) gradients, balanced partitions of a list, memory
reports, version checks. Gradients of a ZeRO engine are clipped by the engine; these functions are for code beside it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from packaging.version import Version

import ds_comm
import ds_comm.device
from deepspeed._lazy import explain_absent
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.memory import available_host_memory
from deepspeed.runtime.partitioned_tensor import PartitionedTensor as PartitionedTensor
from deepspeed.utils.logging import logger


def move_to_device(item: Any, device: torch.device | str, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """A copy of nested lists, tuples and dicts with their tensors on `device`.

    `criterion_func` chooses which leaves move (default: everything that has `.to`); all others are the same objects.
    Lists and tuples keep their type, and so do named tuples and dict subclasses.
    """
    if isinstance(item, Mapping):
        return type(item)({key: move_to_device(v, device, criterion_func) for key, v in item.items()})  # type: ignore[call-arg]
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(move_to_device(v, device, criterion_func) for v in item))
    if isinstance(item, list | tuple):
        return type(item)(move_to_device(v, device, criterion_func) for v in item)
    movable = criterion_func(item) if criterion_func is not None else hasattr(item, "to")
    return item.to(device) if movable else item


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy (when it is loaded) and torch on all devices."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)


def ensure_directory_exists(filename: str) -> None:
    """Create the folder that `filename` is to be written in."""
    os.makedirs(os.path.dirname(os.path.abspath(filename)), exist_ok=True)


# ---- norms ---------------------------------------------------------------------------------------------------------


def get_global_norm(norm_list: Iterable[float | torch.Tensor]) -> Any:
    """Root of the sum of squares of norms: the norm of all parts together."""
    return sum(norm**2 for norm in norm_list) ** 0.5


def get_grad_norm(parameters: Any, norm_type: float = 2, mpu: Any = None) -> float:
    """Norm of the gradients of `parameters` over all model-parallel ranks of `mpu`; -1.0 when it is not finite.

    With `mpu`, a parameter counts on every rank if its attribute `model_parallel` is true (each rank has a piece of
    it), and on model-parallel rank 0 alone otherwise (all ranks have the same).
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    first = mpu is None or mpu.get_model_parallel_rank() == 0
    grads = [p.grad for p in params if p.grad is not None and (first or getattr(p, "model_parallel", False))]
    device = params[0].device if params else torch.device("cpu")
    infinite = norm_type == float("inf")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        value = torch.linalg.vector_norm(grad.detach(), norm_type, dtype=torch.float32).to(device, torch.float64)
        total = torch.maximum(total, value) if infinite else total + value**norm_type
    if mpu is not None:
        op = ds_comm.ReduceOp.MAX if infinite else ds_comm.ReduceOp.SUM
        ds_comm.all_reduce(total, op=op, group=mpu.get_model_parallel_group(), label="grad norm")
    norm = float(total) if infinite else float(total) ** (1.0 / norm_type)
    return norm if norm == norm and norm != float("inf") else -1.0


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2, mpu: Any = None) -> float:
    """Scale gradients in place so that their norm is at most `max_norm`; returns the norm before.

    Like torch's, but over the model-parallel ranks of `mpu`. Gradients that are not finite are left alone, and the
    returned norm is then -1.0 (see `get_grad_norm`).
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm = get_grad_norm(params, norm_type, mpu)
    coefficient = float(max_norm) / (norm + 1e-6)
    if norm >= 0 and coefficient < 1:
        for p in params:
            if p.grad is not None:
                p.grad.detach().mul_(coefficient)
    return norm


class CheckOverflow:
    """Looks for gradients that are inf or NaN, and agrees about it over the model-parallel ranks of `mpu`.

    `zero_reduce_scatter` and `deepspeed` have no effect: a ZeRO engine looks at its own gradients.
    """

    def __init__(
        self,
        param_groups: Iterable[Iterable[torch.Tensor]] | None = None,
        mpu: Any = None,
        zero_reduce_scatter: bool = False,
        deepspeed: Any = None,
    ) -> None:
        self.mpu = mpu
        self.params = [p for group in param_groups or () for p in group]

    def check(self, param_groups: Iterable[Iterable[torch.Tensor]] | None = None) -> bool:
        """Whether any gradient, on any rank, is not finite."""
        params = self.params if param_groups is None else [p for group in param_groups for p in group]
        return self.has_overflow(params)

    def has_overflow(self, params: Iterable[torch.Tensor]) -> bool:
        """The same for a list of parameters."""
        bad = torch.tensor(float(any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in params)))
        if ds_comm.is_initialized():
            group = self.mpu.get_model_parallel_group() if self.mpu is not None else None
            bad = bad.to(ds_comm.device.current_device())
            ds_comm.all_reduce(bad, op=ds_comm.ReduceOp.MAX, group=group, label="overflow")
        return bool(bad.item())


# ---- partitions ----------------------------------------------------------------------------------------------------


def prefix_sum_inc(weights: Sequence[float]) -> list[float]:
    """Sums of the first 1, 2, ... weights."""
    return list(accumulate(weights))


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Offsets (num_parts + 1 of them) of parts of equal length; the first `num_items % num_parts` have one more.

    With no more items than parts each of the first parts has one item and the rest none.
    """
    if num_items <= num_parts:
        return [min(part, num_items) for part in range(num_parts + 1)]
    size, extra = divmod(num_items, num_parts)
    return [part * size + min(part, extra) for part in range(num_parts + 1)]


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Offsets (num_parts + 1) of consecutive parts whose sums differ little.

    Dynamic programming over (number of items, number of parts): the last part begins where the difference between the
    largest and the smallest part sum is least, given the best split of the items before it; of equal splits the later
    one is taken. With no more items than parts: `partition_uniform`.
    """
    num_items = len(weights)
    if num_items <= num_parts:
        return partition_uniform(num_items, num_parts)
    ends = [0.0, *prefix_sum_inc(weights)]
    # best[i]: (largest sum, smallest sum) of the first i items in the parts so far; None where no split exists
    best: list[tuple[float, float] | None] = [None] + [(ends[i], ends[i]) for i in range(1, num_items + 1)]
    splits: list[list[int]] = []
    for parts in range(2, num_parts + 1):
        row: list[tuple[float, float] | None] = [None] * (num_items + 1)
        split = [0] * (num_items + 1)
        for i in range(parts, num_items + 1):
            least = float("inf")
            for j in range(parts - 1, i):
                before = best[j]
                if before is None:
                    continue
                last = ends[i] - ends[j]
                high, low = max(before[0], last), min(before[1], last)
                if high - low <= least:
                    least, row[i], split[i] = high - low, (high, low), j
        best = row
        splits.append(split)
    offsets = [num_items]
    for split in reversed(splits):
        offsets.append(split[offsets[-1]])
    return [0, *reversed(offsets)]


# ---- reports -------------------------------------------------------------------------------------------------------


def _device_memory() -> str:
    """Memory in tensors (MA; on a CPU the resident set), held by the allocator (CA), and their peaks, in GiB."""
    accelerator = get_accelerator()
    numbers = {
        "MA": ds_comm.device.memory_allocated(),
        "Max_MA": ds_comm.device.max_memory_allocated(),
        "CA": accelerator.memory_reserved(),
        "Max_CA": accelerator.max_memory_reserved(),
    }
    return " ".join(f"{name} {number / 2**30:.2f} GB" for name, number in numbers.items())


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log memory of the device and the host on rank 0, and begin a new peak. Does nothing unless `force`."""
    if not force or (ds_comm.is_initialized() and ds_comm.get_rank() != 0):
        return
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    used = total - available_host_memory()
    logger.info(message)
    logger.info(_device_memory())
    logger.info(f"CPU Virtual Memory: used = {used / 2**30:.2f} GB, percent = {used / total:.1%}")
    ds_comm.device.reset_peak_memory()


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """Log the device's memory on rank `print_rank` (-1: on all ranks)."""
    rank = ds_comm.get_rank() if ds_comm.is_initialized() else 0
    if print_rank not in (-1, rank):
        return
    if reset_max:
        ds_comm.device.reset_peak_memory()
    logger.info(f"RANK={rank} MEMSTATS {msg} device={ds_comm.device.current_device()} {_device_memory()}")


def required_torch_version(min_version: float | str | None = None, max_version: float | str | None = None) -> bool:
    """Whether torch is at least `min_version` and at most `max_version` (of which 2.6 includes 2.6.1)."""
    if min_version is None and max_version is None:
        raise ValueError("required_torch_version() needs min_version, max_version or both; both are None")
    installed = Version(Version(torch.__version__).base_version)
    series = Version(f"{installed.major}.{installed.minor}")
    return (min_version is None or installed >= Version(str(min_version))) and (
        max_version is None or series <= Version(str(max_version))
    )


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """`name(arg, key=value)`: how a call would be written."""
    parts = [str(arg) for arg in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    return f"{base}({', '.join(parts)})"


def empty_cache() -> None:
    """Give cached blocks of the accelerator back."""
    ds_comm.device.empty_cache()


explain_absent(__name__)
