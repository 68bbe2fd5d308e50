"""Computation over a long sequence in tiles, so that what is large per token exists for one tile at a time.

    forward    each tile without gradient; results are joined, or added
    backward   each tile again, with gradient; a tile's activations are gone before the next

What a computation keeps between forward and backward is its input and its output: logits, or an MLP's inner activation,
are never whole. Values and gradients are those of the untiled computation, dropout and autocast included. A parameter's
gradient is summed over tiles in fp32 and is one gradient for autograd, so that hooks (ZeRO's reduction) see it once.

The parameters of `compute_params`, and of every module among the arguments, are inputs of the node in autograd's
graph; a parameter that `fn` reads elsewhere is found in backward and gets its gradient there. Under ZeRO-3 a
computation inside its module's forward finds the parameters gathered, in forward and in backward, as any module does.
Those of `compute_params` that are not (a head that is called from outside) are gathered for the computation and get
their gradient while they are.

Source: Bekman et al., Arctic Long Sequence Training (2025), arXiv:2506.13996, section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

import ds_zero
from deepspeed.sequence.exchange import balanced

__all__ = ["SequenceTiledCompute", "TiledFusedLogitsLoss", "TiledMLP", "sequence_tiled_compute"]


@dataclass(frozen=True)
class _Plan:
    """What is called on each tile, and how the tiles' results become one.

    main: the entry of the split arguments that has a gradient. dim: where the arguments are split. output_dim: where
    results are joined, with no `reduction`. fused: a scalar, whose gradient is computed in forward already.
    """

    fn: Callable[..., Tensor]
    shards: int
    main: str
    dim: int
    output_dim: int = 0
    reduction: str | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        if self.shards < 1 or self.reduction not in (None, "mean", "sum"):
            raise ValueError(
                f"shards is {self.shards} and output_reduction {self.reduction!r}; expected at least 1, and None,"
                " 'mean' or 'sum'"
            )

    def tiles(self, split: Mapping[str, Any]) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Rows of each tile and the split arguments of it; balanced, and never empty."""
        length, start = split[self.main].shape[self.dim], 0
        for size in balanced(length, min(self.shards, length)) if length else (0,):
            parts = {
                key: None if value is None else value.narrow(self.dim, start, size) for key, value in split.items()
            }
            yield slice(start, start + size), parts
            start += size

    def joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """The result of all tiles."""
        if self.reduction is None:
            return torch.cat(list(outputs), dim=self.output_dim)
        stacked = torch.stack(list(outputs))
        return stacked.mean(0) if self.reduction == "mean" else stacked.sum(0)

    def run(self, split: dict[str, Any], whole: dict[str, Any], compute_params: Sequence[Any] | None) -> Tensor:
        """The computation as one node of autograd's graph."""
        main = split[self.main]
        for name, value in {**split, **whole}.items():
            if isinstance(value, Tensor) and value.requires_grad and name != self.main and not value.is_leaf:
                raise ValueError(
                    f"{name} needs a gradient, but only {self.main} gets one; detach it, or compute without tiles"
                )
        absent = [parameter for parameter in compute_params or () if _is_absent(parameter)]
        found = [*(compute_params or ())]
        for value in whole.values():
            found += list(value.parameters()) if isinstance(value, nn.Module) else []
        trained = [parameter for parameter in dict.fromkeys(found) if parameter.requires_grad]
        parameters = [parameter for parameter in trained if not _is_absent(parameter)]
        others = {name: value for name, value in split.items() if name != self.main}
        anchor = torch.empty(0, device=main.device, requires_grad=len(trained) > len(parameters))
        with _gathered(absent):
            result: Tensor = _Tiled.apply(  # type: ignore[no-untyped-call]
                self, others, whole, absent, anchor, main, *parameters
            )
        return result


def _is_absent(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has a parameter's elements elsewhere at the moment."""
    return parameter.numel() == 0 and getattr(parameter, "ds_numel", 0) > 0


def _gathered(parameters: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
    return ds_zero.GatheredParameters(parameters) if parameters else contextlib.nullcontext()


class _Replay:
    """Random state and autocast at a forward, to compute it again."""

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type
        self._cpu = torch.get_rng_state()
        self._devices: tuple[list[int], list[Tensor]] = ([], [])
        if device.type != "cpu":
            self._devices = get_device_states(torch.empty(0, device=device))
        self._autocast = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, everything random is as it was; afterwards as if nothing had been drawn."""
        indices, states = self._devices
        with torch.random.fork_rng(indices, device_type=self._kind if indices else "cuda"):
            torch.set_rng_state(self._cpu)
            if indices:
                set_device_states(indices, states, device_type=self._kind)
            with torch.autocast(self._kind, dtype=self._dtype, enabled=self._autocast), torch.enable_grad():
                yield


class _Sums:
    """Gradients of parameters, added in fp32 where they are narrower."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}

    def add(self, parameter: Tensor, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        narrow = gradient.dtype in (torch.float16, torch.bfloat16)
        if parameter in self._sums:
            self._sums[parameter].add_(gradient)
        else:
            self._sums[parameter] = gradient.to(torch.float32 if narrow else gradient.dtype, copy=True)

    def of(self, parameters: Sequence[Tensor], factor: Tensor | None = None) -> list[Tensor | None]:
        """The sums of these parameters in their dtype, times `factor`; None where there is none."""
        found = [(parameter, self._sums.get(parameter)) for parameter in parameters]
        scaled = [(one, value if value is None or factor is None else value * factor) for one, value in found]
        return [None if value is None else value.to(parameter.dtype) for parameter, value in scaled]

    def others(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Parameters with a sum that are none of these."""
        known = set(parameters)
        return [parameter for parameter in self._sums if parameter not in known]


def _leaves(output: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of a tile's graph that are not among the known ones."""
    seen: set[Any] = set()
    stack, found = [output.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is one for one in known):
            found.append(leaf)
        stack.extend(child for child, _ in node.next_functions)
    return found


def _gradients(
    plan: _Plan,
    split: Mapping[str, Any],
    whole: Mapping[str, Any],
    parameters: Sequence[Tensor],
    incoming: Tensor | None,
) -> tuple[Tensor, Tensor, _Sums]:
    """Compute all tiles with gradient: (result, gradient of the main argument, sums of the parameters').

    incoming: the gradient of the result; None stands for 1.
    """
    main, sums, outputs, offset = split[plan.main], _Sums(), [], 0
    of_main = torch.zeros_like(main)
    num_tiles = min(plan.shards, main.shape[plan.dim]) or 1
    for rows, tile in plan.tiles(split):
        part = tile[plan.main].detach().requires_grad_()
        output = plan.fn(**{**tile, plan.main: part}, **whole)
        outputs.append(output.detach())
        if plan.reduction is None:
            assert incoming is not None
            size = output.shape[plan.output_dim]
            own = incoming.narrow(plan.output_dim, offset, size)
            offset += size
        else:
            own = torch.ones_like(output) if incoming is None else incoming.to(output.dtype)
            own = own / num_tiles if plan.reduction == "mean" else own
        if output.grad_fn is None:
            continue
        inputs = [part, *parameters, *_leaves(output, [part, *parameters])]
        if any(_is_absent(one) for one in inputs[1:]):
            raise ValueError(
                "a tiled computation reads a parameter that ZeRO-3 has released again; give it in compute_params"
            )
        of_part, *others = torch.autograd.grad(output, inputs, own, allow_unused=True)
        if of_part is not None:
            of_main.narrow(plan.dim, rows.start, rows.stop - rows.start).copy_(of_part)
        for parameter, gradient in zip(inputs[1:], others, strict=True):
            sums.add(parameter, gradient)
    return plan.joined(outputs), of_main, sums


class _Tiled(torch.autograd.Function):
    """The node of a tiled computation: gradients for the main argument and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        others: Mapping[str, Any],
        whole: Mapping[str, Any],
        absent: list[Tensor],
        anchor: Tensor,
        main: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        split = {plan.main: main, **others}
        ctx.plan, ctx.whole, ctx.parameters, ctx.absent, ctx.early = plan, whole, parameters, absent, None
        # A 16-bit float's gradient needs the loss's scale, which comes with backward.
        if plan.fused and any(ctx.needs_input_grad) and main.dtype != torch.float16:
            with torch.enable_grad():
                result, of_main, sums = _gradients(plan, split, whole, parameters, None)
            ctx.early = of_main, sums
            return result
        ctx.replay = _Replay(main.device)
        tensors = {name: value for name, value in split.items() if isinstance(value, Tensor)}
        ctx.names, ctx.nones = list(tensors), [name for name in split if name not in tensors]
        ctx.save_for_backward(*tensors.values())
        return plan.joined([plan.fn(**tile, **whole) for _, tile in plan.tiles(split)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        with _gathered(ctx.absent):
            if ctx.early is not None:
                factor, (of_main, sums) = gradient, ctx.early
                of_main = of_main * factor
            else:
                split = {**dict(zip(ctx.names, ctx.saved_tensors, strict=True)), **dict.fromkeys(ctx.nones)}
                with ctx.replay.again():
                    _, of_main, sums = _gradients(ctx.plan, split, ctx.whole, ctx.parameters, gradient)
                factor = None
            of_parameters = sums.of(ctx.parameters, factor)
            if rest := sums.others(ctx.parameters):
                torch.autograd.backward(rest, [value for value in sums.of(rest, factor) if value is not None])
        return None, None, None, None, None, of_main, *of_parameters


class TiledMLP:
    """An MLP, or any function of single tokens, in tiles of the sequence."""

    @staticmethod
    def apply(
        fn: Callable[[Any, Tensor], Tensor], self: Any, x: Tensor, shards: int, compute_params: Any = None
    ) -> Tensor:
        """`fn(self, x)` for x [batch, tokens, size] or [tokens, size], computed in `shards` parts of the tokens.

        Args:
            self: what fn gets first; where it is a module, its parameters need not be given.
            compute_params: further parameters that fn uses.
        """
        if x.dim() < 2:
            raise ValueError(f"x of shape {tuple(x.shape)}; expected [batch, tokens, size] or [tokens, size]")
        dim = x.dim() - 2
        plan = _Plan(lambda x, self: fn(self, x), shards, "x", dim, output_dim=dim)
        return plan.run({"x": x}, {"self": self}, compute_params)


class TiledFusedLogitsLoss:
    """A loss from hidden states whose logits exist for one tile at a time, forward and backward in one pass."""

    @staticmethod
    def apply(
        fn: Callable[..., Tensor],
        self: Any,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        shards: int,
        compute_params: Any = None,
        output_reduction: str = "mean",
    ) -> Tensor:
        """`fn(self, x, y)` (with a mask: `fn(self, x, y, mask)`), a scalar, for tiles of the tokens.

        Args:
            x: [batch, tokens, size]; fn gets [rows, size]. y, mask: [batch, tokens]; fn gets [rows].
            output_reduction: "sum", or "mean" over tiles. With tokens that do not count, let fn add ("sum") and divide
                by the number of those that do: tiles have different numbers of them.
        Returns:
            The scalar. Gradients are computed on the way (fp16: in backward, where the loss's scale is known).
        """
        if y.shape != x.shape[:-1] or (mask is not None and mask.shape != y.shape):
            raise ValueError(
                f"x {tuple(x.shape)}, y {tuple(y.shape)}, mask {None if mask is None else tuple(mask.shape)}: expected"
                " [batch, tokens, size], [batch, tokens] and [batch, tokens] or None"
            )

        def call(x: Tensor, y: Tensor, mask: Tensor | None, self: Any) -> Tensor:
            value = fn(self, x, y) if mask is None else fn(self, x, y, mask)
            if value.numel() != 1:
                raise ValueError(f"fn gave a loss of shape {tuple(value.shape)}; expected a scalar for each tile")
            return value.reshape(())

        flat = {"x": x.reshape(-1, x.shape[-1]), "y": y.reshape(-1), "mask": None if mask is None else mask.reshape(-1)}
        plan = _Plan(call, shards, "x", 0, reduction=output_reduction, fused=True)
        return plan.run(flat, {"self": self}, compute_params)


class SequenceTiledCompute:
    """Any function in tiles of the sequence; `sequence_tiled_compute` has the readable signature."""

    @staticmethod
    def apply(
        fn: Callable[..., Tensor],
        seqlen: int,
        shards: int,
        keys_to_shard: Sequence[str],
        keys_to_pass: Sequence[str],
        grad_requiring_tensor_key: str,
        compute_params: Any,
        output_unshard_dimension: int,
        output_reduction: str | None,
        *args: Any,
    ) -> Tensor:
        """As `sequence_tiled_compute`, with the values of `keys_to_shard` and then of `keys_to_pass` in `args`."""
        if len(args) != len(keys_to_shard) + len(keys_to_pass):
            raise ValueError(
                f"{len(args)} values for {len(keys_to_shard)} keys to shard and {len(keys_to_pass)} to pass"
            )
        split = dict(zip(keys_to_shard, args, strict=False))
        whole = dict(zip(keys_to_pass, args[len(keys_to_shard) :], strict=True))
        return sequence_tiled_compute(
            fn,
            seqlen,
            shards,
            split,
            whole,
            grad_requiring_tensor_key,
            compute_params,
            output_unshard_dimension,
            output_reduction,
        )


def sequence_tiled_compute(
    fn: Callable[..., Tensor],
    seqlen: int,
    shards: int,
    kwargs_to_shard: Mapping[str, Any],
    kwargs_to_pass: Mapping[str, Any],
    grad_requiring_tensor_key: str,
    compute_params: Any = None,
    output_unshard_dimension: int = 1,
    output_reduction: str | None = "mean",
) -> Tensor:
    """`fn(**kwargs_to_shard, **kwargs_to_pass)` in tiles of dimension 1 of `kwargs_to_shard`.

    Args:
        seqlen: tokens, the size of that dimension. shards: number of tiles; the last ones may be one token shorter.
        kwargs_to_shard: tensors [batch, tokens, ...], or None. kwargs_to_pass: what every tile gets whole.
        grad_requiring_tensor_key: the entry of `kwargs_to_shard` that gets a gradient.
        compute_params: parameters that fn uses; those of modules in `kwargs_to_pass` need not be given.
        output_unshard_dimension: where the tiles' results are joined, with no reduction.
        output_reduction: None, or "mean" or "sum" of the tiles' results.
    Raises:
        ValueError: no such entry, a tensor of another length, or another entry that needs a gradient.
    """
    split = dict(kwargs_to_shard)
    if not isinstance(split.get(grad_requiring_tensor_key), Tensor):
        raise ValueError(f"grad_requiring_tensor_key {grad_requiring_tensor_key!r} is no tensor of {list(split)}")
    for name, value in split.items():
        if isinstance(value, Tensor) and (value.dim() < 2 or value.shape[1] != seqlen):
            raise ValueError(f"{name} of shape {tuple(value.shape)}; expected [batch, {seqlen}, ...]")
    plan = _Plan(fn, shards, grad_requiring_tensor_key, 1, output_unshard_dimension, output_reduction)
    return plan.run(split, dict(kwargs_to_pass), compute_params)
