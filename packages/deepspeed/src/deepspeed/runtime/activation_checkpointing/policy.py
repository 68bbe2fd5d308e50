"""Which blocks forget what they computed, and how much of it: recomputation as a setting of a model, not of its code.

    none        a block keeps everything that autograd saves
    full        it keeps its arguments and runs its forward again in backward     Chen et al. 2016, arXiv:1604.06174
    selective   it keeps the results of matrix products, convolutions and attention, and makes the cheap rest again
                                                                              Korthikanti et al. 2022, arXiv:2205.05198
    budget      the least of these, block by block, that keeps no more than so many bytes from forward to backward

`interval` k leaves all but every k-th block as they are. Gradients are the same bits under every policy; random numbers
are replayed. Blocks are ds_zero's, and what is recomputed is their `forward`, inside of its hooks: at ZeRO-3 a block is
gathered as often as without a policy, once for forward and once for backward.

Bytes for the budget come from a run of the block on tensors without content, the first time it sees a larger input:
what it newly keeps, its result included (the next block's argument). Weights are not counted, nor is the one block that
backward is recomputing. A block that cannot run so is recomputed in full.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from deepspeed.block_forward import BlockForward, block_forward, restore_forward
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warning_once
from ds_zero import block_modules

__all__ = ["KeptBytes", "Policy", "RecomputePlan"]

Policy = Literal["none", "full", "selective", "budget"]
Mode = Literal["none", "full", "selective"]
Function = Callable[..., Any]
_ORDER: tuple[Mode, ...] = ("none", "selective", "full")

_KEPT_OPS = (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm", "_int_mm", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
)  # fmt: skip


@functools.cache
def _kept_ops() -> frozenset[Any]:
    return frozenset(getattr(torch.ops.aten, name).default for name in _KEPT_OPS if hasattr(torch.ops.aten, name))


def _choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _kept_ops() else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _choose)


class KeptBytes(TorchDispatchMode):
    """Counts what was made inside of it and is still held afterwards, each storage once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def nbytes(self) -> int:
        """Bytes still held now."""
        return sum(nbytes for storage, nbytes in self._made.values() if not storage.expired())


class _Block:
    """The recomputation of one block (a `Recompute`); `mode` is what its next call does."""

    def __init__(self, plan: RecomputePlan, name: str, module: nn.Module, mode: Mode) -> None:
        self.plan = plan
        self.name = name
        self.kind = type(module)
        self.mode = mode

    def __call__(self, block: BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(block.module, "gradient_checkpointing", False) and block.module.training:
            warning_once(
                f"{self.kind.__name__} checkpoints itself (gradient_checkpointing_enable), so the policy"
                f" {self.plan.policy!r} of activation checkpointing has no effect on it; use one of the two"
            )
            return block.run(*args, **kwargs)
        args = tuple(self._unless_cache(value) for value in args)
        kwargs = {key: self._unless_cache(value) for key, value in kwargs.items()}
        self.plan.observe(self, block, args, kwargs)
        if self.mode == "none":
            return block.run(*args, **kwargs)
        if self.mode == "full":
            return self.plan.checkpoint(block.run, *args, **kwargs)
        if block.compiler is not None and block.compiles_checkpoints and block.compiles(args, kwargs):
            return block.compiler(self.plan.selective_of(block.function))(block.module, *args, **kwargs)
        return self.plan.checkpoint(block.plain, *args, context_fn=_contexts, **kwargs)

    def _unless_cache(self, value: Any) -> Any:
        """The argument; None for a cache of keys and values, to which a recomputed block would add them twice."""
        if not (hasattr(value, "get_seq_length") and hasattr(value, "update")):
            return value
        warning_once(
            f"activation checkpointing: {self.kind.__name__} is recomputed, so it trains without the"
            f" {type(value).__name__} it is given; use_cache=False leaves that out from the start"
        )
        return None


class RecomputePlan:
    """A policy at work on a model's blocks.

    Attributes:
        policy, interval, budget: as given. checkpoint: what runs a function so that it is recomputed.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        interval: int = 1,
        budget: int | None = None,
        units: Any = None,
        checkpoint: Function,
    ) -> None:
        _check(policy, interval, budget)
        self.policy, self.interval, self.budget, self.checkpoint = policy, interval, budget, checkpoint
        self._modules = block_modules(model, units)
        if not self._modules and policy != "none":
            warning_once(
                f"activation checkpointing policy {policy!r}: {type(model).__name__} has no repeated blocks, so nothing"
                " is recomputed; name them with deepspeed.utils.set_z3_leaf_modules(model, [Class])"
            )
        self._functions: dict[Function, Function] = {}
        self._sizes: dict[_Block, dict[Mode, int]] = {}
        self._largest: dict[_Block, int] = {}
        self._blocks: list[_Block] = []
        for index, (name, module) in enumerate(self._modules.items()):
            chosen = index % interval == 0 and policy != "none"
            if not chosen:
                _clear(module)
                continue
            mode: Mode = "full" if policy in ("full", "budget") else "selective"
            block_forward(module).recompute = block = _Block(self, name, module, mode)
            self._blocks.append(block)

    @property
    def modes(self) -> Mapping[str, Mode]:
        """Block -> what is recomputed of it: "none", "selective" or "full" (a budget decides in the first forward)."""
        chosen = {block.name: block.mode for block in self._blocks}
        return {name: chosen.get(name, "none") for name in self._modules}

    def close(self) -> None:
        """Leave the blocks as they were."""
        for module in self._modules.values():
            _clear(module)

    def selective_of(self, function: Function) -> Function:
        """A function of (module, *args, **kwargs) that checkpoints `function` selectively; to be compiled."""

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inside = functools.partial(function, module)
            return torch_checkpoint(inside, *args, use_reentrant=False, context_fn=_contexts, **kwargs)

        return self._functions.setdefault(function, forward)

    # -- the budget ----------------------------------------------------------------------------------------------

    def observe(self, block: _Block, forward: BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block is about to run on these arguments: with a larger input than before, decide anew."""
        if self.budget is None:
            return
        nbytes = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if nbytes <= self._largest.get(block, -1):
            return
        self._largest[block] = nbytes
        sizes = _sizes_of(forward, args, kwargs)
        known = self._sizes.get(block)
        if known is None or sizes["none"] > known["none"]:
            self._sizes[block] = sizes
            self._decide()

    def _decide(self) -> None:
        """Recompute less and less blocks, the cheapest way first, until what is kept fits the budget."""
        assert self.budget is not None
        of_kind = {block.kind: sizes for block, sizes in self._sizes.items()}
        sizes = {block: self._sizes.get(block, of_kind.get(block.kind)) for block in self._blocks}
        known = {block: found for block, found in sizes.items() if found is not None}
        kept = sum(found["none"] for found in known.values())
        modes: dict[_Block, Mode] = dict.fromkeys(known, "none")
        for mode in _ORDER[1:]:
            for block, found in known.items():
                if kept <= self.budget:
                    break
                saved = found[modes[block]] - found[mode]
                if saved > 0:
                    kept -= saved
                    modes[block] = mode
        for block, mode in modes.items():
            block.mode = mode
        if kept > self.budget:
            warning_once(
                f"activation checkpointing: the blocks keep {kept} bytes even where all is recomputed, more than"
                f" policy_budget {self.budget}; take smaller micro-batches, or cpu_checkpointing"
            )


def _check(policy: str, interval: int, budget: int | None) -> None:
    if policy not in ("none", "full", "selective", "budget"):
        raise DeepSpeedConfigError(
            f"activation_checkpointing.policy is {policy!r}; expected 'none', 'full', 'selective' or 'budget'"
        )
    if interval < 1:
        raise DeepSpeedConfigError(f"activation_checkpointing.policy_interval is {interval}; expected 1 or more")
    if (policy == "budget") != (budget is not None):
        raise DeepSpeedConfigError(
            f"activation_checkpointing.policy is {policy!r} and policy_budget is {budget}; give bytes per rank together"
            " with the policy 'budget', and with no other"
        )


def _clear(module: nn.Module) -> None:
    block_forward(module).recompute = None
    restore_forward(module)


def _sizes_of(forward: BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Mode, int]:
    """Bytes that a block keeps in each mode."""
    try:
        return {mode: _kept(forward, args, kwargs, mode) for mode in _ORDER}
    except Exception as error:  # the model's code, on tensors without content: anything may be raised
        warning_once(
            f"activation checkpointing: {type(forward.module).__name__} does not run on tensors without content"
            f" ({type(error).__name__}: {error}); it is recomputed in full"
        )
        return {"none": 1 << 62, "selective": 1 << 62, "full": 0}


def _kept(forward: BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode) -> int:
    bare = _Bare(forward)
    held = {**dict(bare.named_parameters()), **dict(bare.named_buffers())}
    with FakeTensorMode():
        fakes = {name: _fake(value) for name, value in held.items()}
        args, kwargs = tree_map(_fake, (args, kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(bare, fakes, args, kwargs, tie_weights=False, strict=False)

        with KeptBytes() as kept:
            if mode == "none":
                result = run(*args, **kwargs)
            else:
                context = {"context_fn": _contexts} if mode == "selective" else {}
                options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, **context}
                result = torch_checkpoint(run, *args, **options, **kwargs)
        nbytes: int = kept.nbytes
        del result  # held until here, since the next block keeps it
        return nbytes


def _fake(value: Any) -> Any:
    """A tensor of the same shape without content; anything else as it is. Inside a FakeTensorMode."""
    if not isinstance(value, Tensor):
        return value
    empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return empty.requires_grad_(value.requires_grad)


class _Bare(nn.Module):
    """A block without its hooks."""

    def __init__(self, forward: BlockForward) -> None:
        super().__init__()
        self.block = forward.module
        self._plain = forward.plain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain(*args, **kwargs)
