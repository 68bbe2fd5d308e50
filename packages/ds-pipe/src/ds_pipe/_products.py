"""Products with weights whose gradients are left to W: which calls they are, and the formulas.

`Watch` sees every torch call with a parameter of a chunk and puts into its `Record` what I and W (`_split`) need:
`Kept` calls, or, under saved-tensor hooks, those that went through `_Product` (Note [Packed] there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["Gradients", "Kept", "Part", "Record", "Watch"]

Gradients = tuple[Tensor | None, ...]
Part = tuple[Callable[[], Gradients], list[nn.Parameter]]  # makes the gradients of these parameters


class Record:
    """One micro-batch's forward of one chunk: its graph's size, each parameter's uses, and what I leaves for W."""

    __slots__ = ("collecting", "deferred", "kept", "num_nodes", "rest", "uses")

    def __init__(self) -> None:
        self.collecting = False  # in I
        self.kept: list[Kept] = []
        self.num_nodes = 0
        self.uses: dict[int, int] = {}
        self.deferred: list[Part] = []
        self.rest: dict[nn.Parameter, Tensor] = {}


class _Call(NamedTuple):
    """A call of one of the three forms: inputs @ matrix (+ bias); the matrix is weight.T for "linear", else weight."""

    form: str
    inputs: Any
    weight: Any
    bias: Any


class Kept(NamedTuple):
    """A call whose product with the weight is left to W: `edge` is where its output's gradient arrives."""

    edge: GradientEdge
    transposed: bool
    column_major: bool
    inputs: Tensor
    version: int
    weight: nn.Parameter
    bias: Any  # a parameter, another tensor, or None

    def later(self, gradient: Tensor, parameters: list[nn.Parameter]) -> Callable[[], Gradients]:
        """What makes the gradients of `parameters` (the weight, the bias, or both) from the output's."""
        if self.inputs._version != self.version:
            raise RuntimeError(
                f"an input of shape {tuple(self.inputs.shape)} of a linear layer was modified in place after it was "
                "used, which its weight's gradient needs; clone it first"
            )
        with_weight, with_bias = (any(p is given for p in parameters) for given in (self.weight, self.bias))
        return partial(_gradients, gradient, self.inputs, self.column_major, self.transposed, with_weight, with_bias)


def _is_column_major(weight: Tensor, transposed: bool) -> bool:
    """Whether the matrix (the weight, or its transpose) lies in columns, which decides the layout of its gradient."""
    of_rows, of_columns = weight.stride()[::-1] if transposed else weight.stride()
    return of_rows == 1 and of_columns == weight.shape[1 if transposed else 0]


def _gradients(
    gradient: Tensor, inputs: Tensor, column_major: bool, transposed: bool, with_weight: bool, with_bias: bool
) -> Gradients:
    found: list[Tensor | None] = []
    if with_weight:
        rows, flat = gradient.reshape(-1, gradient.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        found.append(_weight_gradient(rows, flat, column_major, transposed))
    if with_bias:
        found.append(gradient.sum_to_size(gradient.shape[-1]))
    return tuple(found)


_FORMS: dict[Any, str] = {
    nn.functional.linear: "linear",
    **dict.fromkeys((torch.addmm, Tensor.addmm), "addmm"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), "matmul"),
}


def _parse(form: str, args: Any, kwargs: Any) -> _Call | None:
    if form == "linear" and 2 <= len(args) <= 3 and not kwargs.keys() - {"bias"}:
        return _Call(form, args[0], args[1], args[2] if len(args) == 3 else kwargs.get("bias"))
    if form == "addmm" and len(args) == 3 and not kwargs:
        return _Call(form, args[1], args[2], args[0])
    if form == "matmul" and len(args) == 2 and not kwargs:
        return _Call(form, args[0], args[1], None)
    return None


class Watch:
    """Counts the uses of parameters and sends products with them through `_Product`, between `on` and `off`.

    There the parameters are of a subclass of their own, whose `__torch_function__` sees the calls that take one. (A
    `TorchFunctionMode` would see the same and all other calls as well, for 3 % of a small model's forward.)
    """

    def __init__(self, parameters: Sequence[nn.Parameter], deferrable: set[int]) -> None:
        self._parameters = [parameter for parameter in parameters if type(parameter) is nn.Parameter]
        self._known = {id(parameter) for parameter in self._parameters}
        self._deferrable = self._known & deferrable
        self._record = Record()
        self._counts = True
        self._class = type("Parameter", (nn.Parameter,), {"__torch_function__": staticmethod(self._call)})
        self._plain = (Tensor, nn.Parameter, self._class)

    def on(self, record: Record, *, counts: bool) -> None:
        self._record, self._counts = record, counts
        for parameter in self._parameters:
            parameter.__class__ = self._class

    def off(self) -> None:
        for parameter in self._parameters:
            parameter.__class__ = nn.Parameter

    def _call(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            form = _FORMS.get(func)
            call = _parse(form, args, kwargs) if form is not None and torch.is_grad_enabled() else None
            if call is None or not self._defers(call):
                result = func(*args, **kwargs)
            elif self._counts and torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
                result = func(*args, **kwargs)
                self._keep(call, result)
            else:  # Note [Packed]
                result = _Product.apply(self._record, self._deferrable, *call)  # type: ignore[no-untyped-call]
            if self._counts:
                self._count(result, args, kwargs)
        return result

    def _defers(self, call: _Call) -> bool:
        form, inputs, weight, bias = call
        if id(weight) not in self._deferrable or not weight.requires_grad or type(inputs) not in self._plain:
            return False
        if weight.dim() != 2 or inputs.dim() < 2 or inputs.dtype != weight.dtype or inputs.layout != torch.strided:
            return False
        width = weight.shape[0] if form == "linear" else weight.shape[1]
        if bias is not None and (type(bias) not in self._plain or bias.shape != (width,) or bias.dtype != weight.dtype):
            return False
        return not torch.is_autocast_enabled(inputs.device.type)

    def _keep(self, call: _Call, result: Tensor) -> None:
        form, inputs, weight, bias = call
        made = result._base if result._is_view() else result
        # Of a flattened product, its own output: what happens in place to the view of it comes after that.
        if made is not None and made.shape[-1] == result.shape[-1] and made.numel() == result.numel():
            edge, transposed = get_gradient_edge(made), form == "linear"
            column_major = _is_column_major(weight, transposed)  # here, as stage 3 of ZeRO takes the weight away
            kept = Kept(edge, transposed, column_major, inputs, inputs._version, weight, bias)
            self._record.kept.append(kept)

    def waits(self, parameter: Tensor, record: Record) -> bool:
        """Whether the gradient of `parameter`, used by a call of `_FORMS`, is left to W."""
        return parameter.requires_grad and id(parameter) in self._deferrable and record.uses.get(id(parameter), 0) <= 1

    def never(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do not defer these from now on."""
        self._deferrable.difference_update(id(parameter) for parameter in parameters if parameter.is_leaf)

    def _count(self, result: Any, args: Any, kwargs: Any) -> None:
        results = result if isinstance(result, tuple | list) else (result,)
        if not any(isinstance(one, Tensor) and one.requires_grad for one in results):
            return
        uses, known = self._record.uses, self._known
        for given in (*args, *kwargs.values()):
            for value in given if isinstance(given, tuple | list) else (given,):
                if id(value) in known:
                    uses[id(value)] = uses.get(id(value), 0) + 1


class _Product(torch.autograd.Function):
    """One call of `_FORMS` whose weight's and bias's gradients are left for W."""

    @staticmethod
    def forward(ctx: Any, record: Record, deferrable: set[int], form: str, inputs: Any, weight: Any, bias: Any) -> Any:
        ctx.record, ctx.deferrable, ctx.form, ctx.weight, ctx.bias = record, deferrable, form, weight, bias
        # Where autograd's own linear adds the bias to the flattened product, it also sums the flattened gradient.
        ctx.flat = form == "addmm" or inputs.dim() == 2 or (inputs.dim() == 3 and inputs.is_contiguous())
        ctx.column_major = _is_column_major(weight, form == "linear")
        ctx.save_for_backward(inputs, weight if inputs.requires_grad else None)
        if form == "linear":
            return nn.functional.linear(inputs, weight, bias)
        return torch.matmul(inputs, weight) if form == "matmul" else torch.addmm(bias, inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs, weight = ctx.saved_tensors  # may recompute
        with torch._C.DisableTorchFunctionSubclass():
            return _Product._gradients(ctx, gradients[0], inputs, weight)

    @staticmethod
    def _gradients(ctx: Any, gradient: Tensor, inputs: Tensor, weight: Tensor | None) -> Any:
        record = ctx.record
        rows = gradient.reshape(-1, gradient.shape[-1])
        flat = inputs.reshape(-1, inputs.shape[-1])
        of_inputs = None
        if weight is not None:
            matrix = weight.t() if ctx.form == "linear" else weight
            of_inputs = _input_gradient(rows, flat, matrix).reshape(inputs.shape)
        makers = (
            (ctx.weight, partial(_weight_gradient, rows, flat, ctx.column_major, ctx.form == "linear")),
            (ctx.bias, partial(torch.Tensor.sum_to_size, rows if ctx.flat else gradient, rows.shape[-1])),
        )
        now: list[Tensor | None] = [None, None]
        later: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []
        for at, (parameter, make) in enumerate(makers):
            if parameter is None or not parameter.requires_grad:
                continue
            if not record.collecting:  # a gradient taken within the forward, which uses the parameter once more
                record.uses[id(parameter)] = record.uses.get(id(parameter), 0) + 1
                now[at] = make()
            elif id(parameter) in ctx.deferrable and record.uses.get(id(parameter), 0) <= 1:
                later.append((parameter, make))
            else:
                now[at] = make()
        if later:
            record.deferred.append(_together(later))
        return (None, None, None, of_inputs, *now)


def _together(later: list[tuple[nn.Parameter, Callable[[], Tensor]]]) -> Part:
    makes = [make for _, make in later]
    return lambda: tuple(make() for make in makes), [parameter for parameter, _ in later]


# The two formulas, layouts included, are those of torch's derivative of mm: a gradient has the order of its operand.


def _input_gradient(gradient: Tensor, inputs: Tensor, matrix: Tensor) -> Tensor:
    """Of inputs [rows, k] in inputs @ matrix [k, n], given that of the product [rows, n]."""
    if inputs.stride(0) == 1 and inputs.stride(1) == inputs.shape[0]:
        return matrix.mm(gradient.t()).t()
    return gradient.mm(matrix.t())


def _weight_gradient(gradient: Tensor, inputs: Tensor, column_major: bool, transposed: bool) -> Tensor:
    """Of the weight, whose matrix [k, n] (its transpose where `transposed`) lies in columns or in rows."""
    found = gradient.t().mm(inputs).t() if column_major else inputs.t().mm(gradient)
    return found.t() if transposed else found
