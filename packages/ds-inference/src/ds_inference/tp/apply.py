"""Tensor parallelism of a model as it is: `apply_tensor_parallel` plans it, checks it, and splits it in place.

    applied = apply_tensor_parallel(model, group=group)      # one call on every rank of the group
    print(applied.plan)                                      # what became of which module
    model(input_ids).logits                                  # the whole logits, on every rank

Modules are replaced by those of `layers`; attention modules keep their code and get the rank's numbers of heads.
Everything that can be refused is refused before the first weight is touched, and on every rank alike. A model type
whose code has not been tried with this is run before and after on a short prompt, and put back if it says something
else.

Vocabulary: a *part* of a parameter is (dimension, ranges), or None for all of it; a *copy* is a part that several ranks
hold (key/value heads, when there are fewer of them than ranks); a *duplicate* is a parameter that a lower rank counts.
Invariants: parameters stay the objects they are, so that ties and optimizers hold; ranks that hold the same elements
hold the same bits, and, trained alike, keep them, since gradients of copies and of norms inside of heads are summed
over the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ds_comm
from ds_comm import Communicator
from ds_inference.errors import ModelError
from ds_inference.tp import names
from ds_inference.tp.applied import AppliedPlan, CopiedRows, part_of
from ds_inference.tp.attention import adapt_attention, check_attention, head_norms
from ds_inference.tp.communication import copy_to_ranks, sum_over_ranks
from ds_inference.tp.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedInput,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from ds_inference.tp.modules import check_ties, facts_of, is_stacked_experts, policy_rules, read_modules, stacked_names
from ds_inference.tp.plan import Entry, ModelFacts, Rule, TensorParallelPlan, plan_tensor_parallel
from ds_inference.tp.random import SplitRandom, align_random

__all__ = ["TRIED_MODEL_TYPES", "apply_tensor_parallel", "plan_model"]

TRIED_MODEL_TYPES = frozenset(
    {"bert", "bloom", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral"}
    | {"mpt", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
)
"""Model types whose logits are compared with those of one rank by the tests."""

_PROMPT_LENGTH = 8
_TOLERANCE = 1e-3


def plan_model(
    model: nn.Module,
    num_ranks: int,
    *,
    facts: ModelFacts | None = None,
    rules: Sequence[Rule] = (),
    injection_policy: Any = None,
    grain: int = 64,
    shard_vocabulary: bool = True,
    training: bool = False,
) -> TensorParallelPlan:
    """What each of `num_ranks` ranks would hold of a model, to be printed or applied; nothing is changed.

    Args:
        facts: heads and vocabulary; default: from the model's transformers configuration.
        rules: what is known better than from names; see `plan_tensor_parallel`.
        training: also refuse what could run, but not be trained.
        injection_policy: upstream's form of such rules, {module class: names of its row-parallel layers}.
    Raises:
        ModelError: it cannot be split like this, and why.
    """
    if injection_policy is not None:
        rules = [*rules, *policy_rules(model, injection_policy)]
    plan = plan_tensor_parallel(
        read_modules(model),
        facts or facts_of(model),
        num_ranks,
        grain=grain,
        rules=rules,
        shard_vocabulary=shard_vocabulary,
    )
    if num_ranks > 1:
        check_attention(model, plan)
        check_ties(model, plan)
        _check_stacked(model, plan)
        if training:
            _check_countable(plan)
    return plan


@torch.no_grad()
def apply_tensor_parallel(
    model: nn.Module,
    plan: TensorParallelPlan | None = None,
    *,
    group: Any = None,
    check: bool | None = None,
    **planning: Any,
) -> AppliedPlan:
    """Split a model in place over the ranks of a group; collective, with the same model on every rank.

    Args:
        model: a transformers model, or any with `facts`; on the meta device its parts stay there (`AppliedPlan.load`).
        plan: from `plan_model`; default: made here from `planning`, the keywords of `plan_model`.
        group: the tensor-parallel ranks; None: the world.
        check: compare logits before and after on a short prompt, and undo the split if they differ (this needs the
            memory of the whole model until then); default: only for model types not in `TRIED_MODEL_TYPES`.
    Returns:
        what was applied; also kept as `model.tensor_parallel`.
    Raises:
        ModelError: it cannot be split, it is split already, or it would change; the model is as it was.
        DivergenceError: the ranks' plans differ.
    """
    if getattr(model, "tensor_parallel", None) is not None:
        raise ModelError(f"this {type(model).__name__} is split over tensor-parallel ranks already; split it once")
    ds_comm.init_distributed()
    communicator = ds_comm.communicator(group)
    made = _planned(model, plan, communicator, planning)
    communicator.agree(f"{type(made).__name__}: {made}", label="the tensor-parallel plan")
    if isinstance(made, ModelError):
        raise made
    applied = AppliedPlan(made, communicator, model)
    if communicator.size > 1:
        align_random(communicator)
        model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
        unsure = model_type not in TRIED_MODEL_TYPES if check is None else check
        if unsure and not any(p.is_meta for p in model.parameters()):
            _apply_checked(model, applied)
        else:
            _Splitter(model, applied, undo=None).split()
    model.__dict__["tensor_parallel"] = applied
    return applied


def _planned(
    model: nn.Module, plan: TensorParallelPlan | None, communicator: Communicator, planning: dict[str, Any]
) -> TensorParallelPlan | ModelError:
    try:
        if plan is None:
            return plan_model(model, communicator.size, **planning)
        if planning:
            raise ModelError(
                f"a plan is given, and with it {sorted(planning)}, which are for making one; leave them out"
            )
        if plan.num_ranks != communicator.size:
            raise ModelError(f"the plan is for {plan.num_ranks} ranks, the group has {communicator.size}; plan anew")
        return plan
    except ModelError as error:
        return error


def _check_countable(plan: TensorParallelPlan) -> None:
    """A parameter that is partly this rank's own and partly a copy could not be counted once in a norm."""
    fused = [entry.module.name for entry in plan.entries if entry.unit in ("qkv", "groups")]
    if plan.heads.copied and fused:
        raise ModelError(
            f"{fused[0]} would hold a rank's own query heads and copies of key/value heads in one parameter, which "
            f"cannot be trained; use at most {plan.heads.num_kv_heads} tensor-parallel ranks"
        )


def _check_stacked(model: nn.Module, plan: TensorParallelPlan) -> None:
    """Both parameters of stacked experts are split, or neither."""
    by_name = {entry.module.name: entry for entry in plan.entries}
    for name, module in model.named_modules():
        if is_stacked_experts(module):
            up, down = (by_name[f"{name}.{one}"].style for one in stacked_names())
            if (up, down) not in (("column", "row"), ("replicated", "replicated")):
                raise ModelError(f"{name}: gate_up_proj is {up}, down_proj {down}; expected column and row, or neither")


# -- the check --------------------------------------------------------------------------------------------------------


def _apply_checked(model: nn.Module, applied: AppliedPlan) -> None:
    """Split, unless that changes what the model says; then put everything back."""
    prompt = _prompt(model, applied.plan)
    was_training = model.training
    model.eval()
    undo: list[Callable[[], None]] = []
    failure = ""
    try:
        before = _logits(model, prompt)
        _Splitter(model, applied, undo).split()
        try:
            after = _logits(model, prompt)
            difference = float((after - before).abs().max()) / max(float(before.abs().max()), 1e-6)
            if not difference <= _tolerance(model):
                failure = f"its output changes by {difference:.1e} of its largest value"
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, ds_comm.CommError | ds_comm.DivergenceError):
                raise
            failure = f"it fails with {type(error).__name__}: {error}"
    finally:
        model.train(was_training)
    if applied.communicator.size > 1:
        texts = _texts_of_all(failure, applied.communicator)
        failure = next((text for text in texts if text), "")
    if failure:
        for back in reversed(undo):
            back()
        raise ModelError(
            f"{type(model).__name__} cannot be split by its names alone: on a prompt of {_PROMPT_LENGTH} tokens "
            f"{failure}; give rules=[Rule(pattern, 'replicated')] for the modules concerned, or use one rank"
        )


def _tolerance(model: nn.Module) -> float:
    """Of a 16-bit model's logits, a part is rounding."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return _TOLERANCE if dtype == torch.float32 else 30 * float(torch.finfo(dtype).eps)


def _prompt(model: nn.Module, plan: TensorParallelPlan) -> Tensor:
    sizes = [e.module.shape[0] for e in plan.entries if e.module.kind == "embedding"]
    highest = min(max(sizes, default=_PROMPT_LENGTH), 1 << 16)
    device = next(iter(model.parameters())).device
    return (torch.arange(_PROMPT_LENGTH, device=device).add(1).mul(7919) % highest).unsqueeze(0)


def _logits(model: nn.Module, prompt: Tensor) -> Tensor:
    output = model(prompt)
    first = output if isinstance(output, Tensor) else output[0]
    return first.detach().float()


def _texts_of_all(text: str, communicator: Communicator) -> list[str]:
    found: list[Any] = [None] * communicator.size
    ds_comm.all_gather_object(found, text, group=communicator.group)
    return [str(one) for one in found]


# -- the split --------------------------------------------------------------------------------------------------------


class _Splitter:
    """One pass over the plan: each entry's module is replaced by this rank's part of it."""

    def __init__(self, model: nn.Module, applied: AppliedPlan, undo: list[Callable[[], None]] | None) -> None:
        self.model, self.applied, self.undo = model, applied, undo
        self.plan, self.communicator = applied.plan, applied.communicator
        self.rank = self.communicator.rank
        self.parts = self.plan.tensors(self.rank)
        self.cut: set[int] = set()
        """Parameters that have their part already: tied ones come more than once."""
        self._shared: dict[str, SharedInput] = {}
        self._draws = _draws(model)

    def split(self) -> None:
        if self.undo is not None:
            self.undo.append(_restorer(self.model))
        norms = head_norms(self.model, self.plan)
        experts = [(n, m) for n, m in self.model.named_modules() if is_stacked_experts(m)]
        for entry in self.plan.entries:
            if entry.style != "replicated" and len(entry.module.shape) == 2:
                self._replace(entry)
        for name, module in experts:
            if self.plan[f"{name}.{stacked_names()[0]}"].style != "replicated":
                self._split_experts(name, module)
        adapt_attention(self.model, self.plan, self.rank)
        for parameter in norms:
            self.applied.sum_gradient(parameter, None)
        self.applied.finish()

    def _part(self, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """The same parameter with this rank's part in it: optimizers and ties that hold it still do."""
        part = self.parts[name] if parameter is not None else None
        if parameter is not None and part is not None and id(parameter) not in self.cut:
            self.cut.add(id(parameter))
            if self.undo is not None:
                self.undo.append(functools.partial(setattr, parameter, "data", parameter.data))
            parameter.grad = None
            parameter.data = part_of(parameter.data, part)
        return parameter

    def _replace(self, entry: Entry) -> None:
        name = entry.module.name
        old = self.model.get_submodule(name)
        weight = self._part(f"{name}.weight", old.weight)  # type: ignore[arg-type]
        bias = self._part(f"{name}.bias", getattr(old, "bias", None))
        assert weight is not None  # only modules with one are planned
        new = self._layer(entry, old, weight, bias)
        new.train(old.training)
        home, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(home), last, new)
        if entry.unit in ("kv_heads", "qkv", "groups") and self.plan.heads.copied:
            for parameter in (weight, bias):
                if parameter is not None:
                    self.applied.sum_gradient(parameter, self._copied_rows(entry))

    def _layer(self, entry: Entry, old: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        name, comm, transposed = entry.module.name, self.communicator, entry.module.kind == "linear_t"
        if entry.module.kind == "embedding":
            first = entry.pieces[self.rank][0][0] if entry.pieces[self.rank] else 0
            return VocabParallelEmbedding(
                weight,
                first,
                entry.module.shape[0],
                comm,
                label=name,
                padding_idx=old.padding_idx,  # type: ignore[arg-type]
                embed_scale=getattr(old, "embed_scale", None),
            )
        if entry.style == "vocabulary":
            sizes = [entry.local_size(rank) or 0 for rank in range(comm.size)]
            return VocabParallelHead(weight, bias, sizes, comm, label=name, transposed=transposed)
        if entry.style == "row":
            random = self._random(entry)
            return RowParallelLinear(weight, bias, comm, label=name, transposed=transposed, random=random)
        return ColumnParallelLinear(
            weight,
            bias,
            comm,
            label=name,
            transposed=transposed,
            shared=self._shared_input(entry),
            random=self._random(entry),
        )

    def _shared_input(self, entry: Entry) -> SharedInput:
        """One for all columns of a module."""
        home = entry.module.name.rpartition(".")[0]
        if home not in self._shared:
            readers = sum(
                1 for e in self.plan.entries if e.style == "column" and e.module.name.rpartition(".")[0] == home
            )
            self._shared[home] = SharedInput(self.communicator, readers, home)
        return self._shared[home]

    def _random(self, entry: Entry) -> SplitRandom | None:
        """The random numbers of the region that `entry` begins or ends; None for a model that draws none."""
        return self._draws.setdefault(_region(entry), _Region(self.rank)).of(entry) if self._draws is not None else None

    def _copied_rows(self, entry: Entry) -> CopiedRows:
        """Which rows of a projection's outputs are copies, and where all ranks' gradients of them are added up."""
        heads, low = self.plan.heads, self.plan.heads.kv[self.rank][0]
        queries = heads.query[self.rank][1] - heads.query[self.rank][0] if entry.unit != "kv_heads" else 0
        of_each = 1 if entry.unit == "kv_heads" else 2
        local = entry.local_size(self.rank) or 0
        width = local // (queries + of_each)
        return CopiedRows(
            dim=entry.module.dims[0],
            rows=(queries * width, local),
            slot=low * of_each * width,
            num_slots=heads.num_kv_heads * of_each * width,
            first=low not in [heads.kv[rank][0] for rank in range(self.rank)],
        )

    def _split_experts(self, name: str, module: nn.Module) -> None:
        """Stacked experts run as they are on narrower experts; what they return is a part of the sum."""
        width = self.plan[f"{name}.down_proj"].module.num_in
        for one in stacked_names():
            self._part(f"{name}.{one}", getattr(module, one))
        own = self.plan[f"{name}.down_proj"].local_size(self.rank)
        for attribute, value in vars(module).copy().items():
            if type(value) is int and value == width and "intermediate" in attribute:
                setattr(module, attribute, own)
        edges = _ExpertEdges(self.communicator, name)
        handles = [
            module.register_forward_pre_hook(edges.before, with_kwargs=True),
            module.register_forward_hook(edges.after),
        ]
        if self.undo is not None:
            self.undo += [handle.remove for handle in handles]


class _Region:
    """The layers between which one rank computes its own part, for random numbers: the first column opens it."""

    def __init__(self, rank: int) -> None:
        self.random = SplitRandom(rank)
        self._opened = False

    def of(self, entry: Entry) -> SplitRandom | None:
        if entry.style == "row":
            return self.random
        if self._opened:
            return None
        self._opened = True
        return self.random


def _region(entry: Entry) -> str:
    heads = entry.unit in ("heads", "kv_heads", "qkv", "groups")
    return f"{names.block_of(entry.module.name)}: {'attention' if heads else 'features'}"


def _draws(model: nn.Module) -> dict[str, _Region] | None:
    """An empty table of regions if some dropout of the model drops anything, else None."""
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    rates += [
        value
        for module in model.modules()
        for key, value in vars(module).items()
        if "drop" in key and isinstance(value, float)
    ]
    return {} if any(rate > 0 for rate in rates) else None


class _ExpertEdges:
    """Hooks around stacked experts: what goes in is read by every rank's part, what comes out is summed."""

    def __init__(self, communicator: Communicator, label: str) -> None:
        self.communicator, self.label = communicator, label

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(self._read, args)), {key: self._read(value) for key, value in kwargs.items()}

    def _read(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return copy_to_ranks(value, self.communicator, self.label)
        return value

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return sum_over_ranks(output, self.communicator, self.label)


def _restorer(model: nn.Module) -> Callable[[], None]:
    """A function that puts modules, parameters, attributes and hooks back as they are now."""
    state: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in model.modules():
        kept = dict(vars(module))
        for key in ("_modules", "_parameters", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            kept[key] = kept[key].copy()
        state.append((module, kept))

    def restore() -> None:
        for module, kept in state:
            module.__dict__.clear()
            module.__dict__.update(kept)

    return restore
