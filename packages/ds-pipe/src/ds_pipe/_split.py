"""Backward in two parts, I (input gradient) and W (weight gradient), with the bits of autograd's own backward.

During forward every torch call with a parameter is seen (`Watch`). Where a weight enters through `F.linear`,
`torch.addmm` or a matrix product, the call's input is kept, and where its gradient will arrive in the graph. I is then
`torch.autograd.grad` with respect to the chunk's inputs, the outputs of those calls, and all other parameters: autograd
leaves out the products that W computes from (input, output's gradient), the same calls in the same layouts as
autograd's own formulas. Each goes to its parameter through a `_Deliver` node, so that AccumulateGrad runs with every
hook on it, once, and may keep the tensor without a copy.

Note [Packed]: under saved-tensor hooks (activation checkpointing, offloading) an input must not be kept by us. There
the call goes through an autograd node of ours, which saves it as any node would and whose backward leaves (input,
output's gradient) for W. A recompute in I is watched alike, so that it saves what the forward saved.

Invariants. A parameter that several calls of one forward take is not deferred: autograd sums its gradient as ever, in
its own order. Calls that only the graph shows (a weight given to an autograd.Function) are looked for in every graph
with a number of nodes that the chunk has not had before, and such weights not deferred either. Nothing is deferred
under autocast, for tensor subclasses, or outside the three forms above. Reentrant checkpointing works with whole
backwards only: torch refuses it in I. Tensor hooks of parameters run when the gradient is delivered, not in I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_pipe._products import Gradients, Kept, Part, Record, Watch

__all__ = ["Record", "SplitBackward", "deliver"]


class SplitBackward:
    """I and W of one chunk, whose parameters are given; those in `at_once` are never deferred.

    Without `defers` none is, and W only delivers what I found. Which ones learn may change from batch to batch.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, at_once: Sequence[nn.Parameter] = (), defers: bool = True
    ) -> None:
        self._parameters = list(parameters)
        known = {id(parameter) for parameter in parameters}
        self._watch = Watch(parameters, known - {id(parameter) for parameter in at_once}) if defers else None
        self._checked: set[int] = set()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    @contextmanager
    def watching(self, record: Record, *, recomputing: bool = False) -> Iterator[None]:
        """Around the chunk's forward, and its recompute."""
        if self._watch is None:
            yield
            return
        self._watch.on(record, counts=not recomputing)
        first = torch._C._autograd._get_sequence_nr()
        try:
            yield
        finally:
            self._watch.off()
            if not recomputing:
                record.num_nodes = torch._C._autograd._get_sequence_nr() - first

    def input_gradients(
        self, record: Record, outputs: list[Tensor], gradients: list[Tensor | None], inputs: list[Tensor]
    ) -> list[Tensor | None]:
        """I: the gradients of `inputs`; what parameters get waits in `record`."""
        parameters = self.parameters
        if not outputs or not (inputs or parameters):
            return [None] * len(inputs)
        kept, waiting = self._choose(record, outputs)
        now = [parameter for parameter in parameters if id(parameter) not in waiting]
        wanted = (*inputs, *now, *(call.edge for call, _ in kept))
        starts = [torch.ones_like(o) if g is None else g for o, g in zip(outputs, gradients, strict=True)]
        record.collecting = True
        with _without_tensor_hooks(now), self.watching(record, recomputing=True):
            found = _grad(tuple(outputs), tuple(starts), wanted)
        middle, end = len(inputs), len(inputs) + len(now)
        record.rest = {p: grad for p, grad in zip(now, found[middle:end], strict=True) if grad is not None}
        for (call, parameters), gradient in zip(kept, found[end:], strict=True):
            if gradient is not None:
                record.deferred.append((call.later(gradient, parameters), parameters))
        return list(found[:middle])

    def _choose(self, record: Record, outputs: list[Tensor]) -> tuple[list[tuple[Kept, list[nn.Parameter]]], set[int]]:
        """The kept calls with their parameters that wait for W, and the ids of all those; empties `record.kept`."""
        watch = self._watch
        if watch is None or not record.kept:
            return [], set()
        if record.num_nodes not in self._checked:  # as many nodes as before: the same graph
            self._checked.add(record.num_nodes)
            watch.never(parameter for parameter, num in _uses_in_graph(outputs).items() if num > 1)
        chosen = []
        for call in record.kept:
            given = [p for p in (call.weight, call.bias) if p is not None and watch.waits(p, record)]
            if given:
                chosen.append((call, given))
        record.kept = []
        return chosen, {id(parameter) for _, parameters in chosen for parameter in parameters}

    def accumulate(self, record: Record) -> None:
        """W: compute what was deferred, and deliver all gradients of the micro-batch."""
        parts: list[Part] = []
        rest = record.rest
        for make, parameters in record.deferred:
            # Used once more where nobody sees it (a scripted module): a sum of two, in either order.
            more = {at: rest.pop(parameter) for at, parameter in enumerate(parameters) if parameter in rest}
            parts.append((_with_more(make, more) if more else make, parameters))
        record.deferred = []
        deliver(parts, rest)


def _uses_in_graph(outputs: Sequence[Tensor]) -> dict[nn.Parameter, int]:
    """How many nodes of the outputs' graph hand a gradient to each parameter, directly or through one view of it.

    (A gradient taken within the forward, with create_graph, shares its view of the weight with the forward's product.)
    """
    found: dict[nn.Parameter, int] = {}
    views: dict[Any, nn.Parameter] = {}
    arriving: dict[Any, int] = {}
    todo: list[Any] = [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is None:
            continue
        arriving[node] = arriving.get(node, 0) + 1
        if arriving[node] > 1:
            continue
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is None:
                todo.append(following)
            else:
                found[variable] = found.get(variable, 0) + 1
                if len(node.next_functions) == 1:
                    views[node] = variable
    for node, variable in views.items():
        found[variable] += arriving[node] - 1
    return found


def _grad(outputs: tuple[Tensor, ...], starts: tuple[Tensor, ...], inputs: tuple[Any, ...]) -> Gradients:
    """`torch.autograd.grad(outputs, inputs, starts, allow_unused=True)`, which watched parameters would intercept."""
    run = torch.autograd.Variable._execution_engine.run_backward
    found: Gradients = run(outputs, starts, False, False, inputs, allow_unreachable=True, accumulate_grad=False)
    return found


def deliver(parts: list[Part], rest: dict[nn.Parameter, Tensor]) -> None:
    """Give parameters their gradients through autograd: what `parts` make, one after the other, then `rest`.

    Empties both, so that a gradient has no other owner when it is accumulated.
    """

    def give() -> Gradients:
        gradients = tuple(rest.values())
        rest.clear()
        return gradients

    stand_in: Callable[..., Tensor] = _Deliver.apply
    nodes = [stand_in(give, *rest)] if rest else []
    nodes += [stand_in(make, *parameters) for make, parameters in parts]
    parts.clear()
    if nodes:
        torch.autograd.backward(nodes)


class _Deliver(torch.autograd.Function):
    """Stands where a forward would: its backward makes the gradients, which go on to AccumulateGrad."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Gradients], *parameters: Tensor) -> Tensor:
        ctx.make = make
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        make, ctx.make = ctx.make, None
        return (None, *make())


def _with_more(make: Callable[[], Gradients], more: dict[int, Tensor]) -> Callable[[], Gradients]:
    def both() -> Gradients:
        return tuple(more[at] + one if one is not None and at in more else one for at, one in enumerate(make()))

    return both


@contextmanager
def _without_tensor_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """`torch.autograd.grad` would run the tensor hooks of what it is asked for; they run at delivery instead."""
    taken = [(hooks, dict(hooks)) for parameter in parameters if (hooks := parameter._backward_hooks)]
    for hooks, _ in taken:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in taken:
            hooks.update(kept)
