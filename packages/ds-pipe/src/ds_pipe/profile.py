"""What each layer costs, measured: seconds forward, seconds backward by kind, bytes kept for backward.

`profile_layers` builds one layer after the other, runs it on what the layer before it returned, and drops it. All ranks
measure at the same time, as they will compute at the same time (they share a memory bus), and agree on the mean. Per
layer, F is the time of its forward, I of the gradients of its inputs alone, B of a whole backward that adds to
gradients which are already there, and W = B - I. The last layer's times contain the loss. They are the least of
`repeats` runs after one that does not count: what else runs on the machine only adds.

Invariants. Nothing is changed by it: not the random generator, gradients or buffers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_comm
from ds_pipe.errors import PartitionError
from ds_pipe.layers import LayerSpec, TiedLayerSpec
from ds_pipe.schedule.simulate import Costs

__all__ = ["profile_layers"]


class _Times(NamedTuple):
    """Seconds, and bytes."""

    forward: float
    input_gradient: float
    backward: float
    activation: int


def profile_layers(
    layers: Sequence[Any],
    sample: tuple[Any, Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    repeats: int = 5,
    group: dist.ProcessGroup | None = None,
) -> Costs:
    """Costs per layer, the same on all ranks of `group` (None: the world), which all call this.

    `layers` as a `PipelineModule` takes them, `sample` one micro-batch (inputs, labels) of the shape to come. Times are
    seconds, activations bytes. For `partition_layers(costs=result.totals)`, `choose`, and `simulate` after `merge`.

    PartitionError for no layers or no repeats.
    """
    if not layers or repeats < 1:
        raise PartitionError(f"{len(layers)} layers measured {repeats} times; expected at least one layer and one time")
    inputs, labels = sample
    measured: list[_Times] = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for index, layer in enumerate(layers):
            function, module = _build(layer)
            use = function
            if index == len(layers) - 1 and loss_fn is not None:
                use = _WithLoss(function, loss_fn, labels)
            with _unchanged(module):
                times, inputs = _measure(use, inputs, module, repeats)
            measured.append(times)
    forward, input_gradient, backward, activation = _agreed(measured, group)
    return Costs(
        forward=forward,
        input_gradient=input_gradient,
        weight_gradient=tuple(b - i for b, i in zip(backward, input_gradient, strict=True)),
        backward=backward,
        activation=tuple(map(int, activation)),
    )


class _WithLoss:
    """The last layer and the loss."""

    def __init__(self, function: Callable[[Any], Any], loss_fn: Callable[[Any, Any], Tensor], labels: Any) -> None:
        self._function = function
        self._loss_fn = loss_fn
        self._labels = labels

    def __call__(self, inputs: Any) -> Tensor:
        return self._loss_fn(self._function(inputs), self._labels)


def _build(layer: Any) -> tuple[Callable[[Any], Any], nn.Module]:
    """The layer as a function, and the module with its weights (an empty one for a plain function)."""
    module = layer.build() if isinstance(layer, LayerSpec) else layer
    if isinstance(layer, TiedLayerSpec) and layer.forward_fn is not None:
        use = layer.forward_fn
        return (lambda inputs: use(module, inputs)), module
    return module, module if isinstance(module, nn.Module) else nn.Module()


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Gradients and buffers are afterwards what they were."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _measure(function: Callable[[Any], Any], inputs: Any, module: nn.Module, repeats: int) -> tuple[_Times, Any]:
    """The layer's times, and what it returned, as the next layer gets it."""
    in_place = any(getattr(part, "inplace", False) is True for part in module.modules())
    given = _mapped(inputs, _leaf)
    saved = _Saved(module, given)
    passed = _mapped(given, torch.clone) if in_place else given
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
        outputs = function(passed)
    activation = saved.nbytes(outputs)
    _backward(outputs, given)  # makes gradients for the next ones to be added to
    seconds: list[tuple[float, float, float]] = []
    for _ in range(repeats):
        given = _mapped(inputs, _leaf)
        passed = _mapped(given, torch.clone) if in_place else given
        start = _now()
        outputs = function(passed)
        forward = _now() - start
        seconds.append((forward, *_backward(outputs, given)))
    forward, input_gradient, backward = map(min, zip(*seconds, strict=True))
    return _Times(forward, min(input_gradient, backward), backward, activation), _mapped(outputs, _leaf)


def _backward(outputs: Any, inputs: Any) -> tuple[float, float]:
    """Seconds of the gradients of the inputs alone, and of a whole backward."""
    sources = [tensor for tensor in _tensors(inputs) if tensor.requires_grad]
    results = [tensor for tensor in _tensors(outputs) if tensor.requires_grad]
    if not results:
        return 0.0, 0.0
    gradients = [torch.ones_like(tensor) for tensor in results]
    input_gradient = 0.0
    if sources:
        start = _now()
        torch.autograd.grad(results, sources, gradients, retain_graph=True, allow_unused=True)
        input_gradient = _now() - start
    start = _now()
    torch.autograd.backward(results, gradients)
    return input_gradient, _now() - start


class _Saved:
    """Notes what a forward keeps for its backward."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        self._not_counted = {_place(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._constants = {_place(tensor) for tensor in _tensors(inputs) if not tensor.requires_grad}
        self._kept: dict[int, int] = {}

    def note(self, tensor: Tensor) -> Tensor:
        self._kept[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def nbytes(self, outputs: Any) -> int:
        """Bytes of the storages, but for weights, and for constants that are handed on (the next layer has them)."""
        handed_on = self._constants & {_place(tensor) for tensor in _tensors(outputs)}
        return sum(size for place, size in self._kept.items() if place not in self._not_counted | handed_on)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _agreed(measured: Sequence[_Times], group: dist.ProcessGroup | None) -> list[tuple[float, ...]]:
    """Per field of `_Times`, the ranks' mean for every layer."""
    found = torch.tensor(measured, dtype=torch.float64)
    if ds_comm.is_initialized() and ds_comm.get_world_size(group) > 1:
        if ds_comm.communicator(group).kind == "torch":
            found = found.to(ds_comm.device.current_device())
        ds_comm.all_reduce(found, group=group, label="layer costs")
        found /= ds_comm.get_world_size(group)
    return [tuple(column) for column in found.T.tolist()]


def _now() -> float:
    ds_comm.device.synchronize()
    return time.perf_counter()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _tensors(payload: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(payload, found.append)
    return found


def _mapped(payload: Any, function: Callable[[Tensor], Any]) -> Any:
    """The payload with `function(tensor)` in place of its tensors."""
    if isinstance(payload, Tensor):
        return function(payload)
    if isinstance(payload, tuple | list):
        return type(payload)([_mapped(item, function) for item in payload])
    if isinstance(payload, dict):
        return {key: _mapped(item, function) for key, item in payload.items()}
    return payload
