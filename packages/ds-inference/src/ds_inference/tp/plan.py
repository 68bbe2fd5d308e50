"""The tensor-parallel plan: from the names, kinds and shapes of a model's modules to what of each every rank holds.

A linear layer is **column**-parallel (its outputs are split), **row**-parallel (its inputs are split, and an all-reduce
adds up the ranks' results, then the bias once), or **replicated**. What hides between a column and the row that reads
it is one of two things: heads of attention, or features of an MLP. An embedding or an output layer over the vocabulary
is split along it (**vocabulary**). Which is which comes from names (`names`, upstream's rules), is checked against the
shapes, and is data that can be printed before anything runs: no torch here.

Invariants: every element of a weight is on exactly one rank, but for replicated modules and for key/value heads when
there are fewer of them than ranks; heads are whole; the features a row-parallel layer reads on a rank are those that
the column-parallel layers before it make there. What would break one of them is a ModelError that names the module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ds_inference.errors import ModelError
from ds_inference.tp import names
from ds_inference.tp.split import HeadSplit, Piece, split_features, split_heads

__all__ = ["Entry", "ModelFacts", "ModuleInfo", "Rule", "TensorParallelPlan", "plan_tensor_parallel"]

Kind = Literal["linear", "linear_t", "embedding", "norm", "layer_norm", "other"]
Style = Literal["column", "row", "vocabulary", "replicated"]
Unit = Literal["heads", "kv_heads", "qkv", "groups", "features", "pair", "vocabulary", ""]

_OUTSIDE = "outside of the repeated blocks"


@dataclass(frozen=True)
class ModuleInfo:
    """One module with a weight, in order of registration. Experts kept in one parameter are a layer of three
    dimensions, [experts, out, in], and `name` is the parameter's."""

    name: str
    kind: Kind
    """linear: weight [..., out, in]; linear_t: [in, out] (transformers' Conv1D); embedding: [rows, width]; layer_norm:
    torch's LayerNorm; norm: any other."""
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        """The dimensions of the weight that are the layer's outputs and inputs."""
        rank = len(self.shape)
        return (rank - 1, rank - 2) if self.kind == "linear_t" else (rank - 2, rank - 1)

    @property
    def num_out(self) -> int:
        return self.shape[self.dims[0]]

    @property
    def num_in(self) -> int:
        return self.shape[self.dims[1]]


@dataclass(frozen=True)
class ModelFacts:
    """What shapes alone do not say."""

    num_heads: int
    num_kv_heads: int
    vocab_size: int | None = None
    model_type: str = ""

    @classmethod
    def from_config(cls, config: Any) -> ModelFacts:
        """From an object with the attributes of a transformers configuration; ModelError when it has no heads."""

        def first(*keys: str) -> Any:
            return next((value for key in keys if (value := getattr(config, key, None)) is not None), None)

        heads = first("num_attention_heads", "n_head", "num_heads", "n_heads")
        if not isinstance(heads, int):
            raise ModelError(
                f"{type(config).__name__} has no number of attention heads; give ModelFacts(num_heads=...)"
            )
        nested = getattr(config, "attn_config", None)
        kv = first("num_key_value_heads", "num_kv_heads", "multi_query_group_num") or getattr(
            nested, "kv_n_heads", None
        )
        model_type = str(getattr(config, "model_type", ""))
        if model_type in ("gpt_bigcode", "falcon") and not getattr(config, "new_decoder_architecture", False):
            kv = 1 if getattr(config, "multi_query", False) else heads
        return cls(heads, kv or heads, first("vocab_size"), model_type)


@dataclass(frozen=True)
class Rule:
    """What the user knows better: modules whose name the regular expression finds. The first rule that fits decides."""

    pattern: str
    style: Style
    unit: Unit = ""
    """What is split, when the name does not tell: heads, kv_heads, qkv, groups, features or pair."""


@dataclass(frozen=True)
class Entry:
    """What becomes of one module."""

    module: ModuleInfo
    style: Style
    unit: Unit
    why: str
    pieces: tuple[Piece, ...] = ()
    """Per rank the ranges of the split dimension; empty when replicated."""

    @property
    def dim(self) -> int | None:
        """The dimension of the weight that is split."""
        if self.style == "replicated":
            return None
        if self.module.kind == "embedding":
            return 0
        return self.module.dims[1 if self.style == "row" else 0]

    @property
    def bias(self) -> Literal["none", "split", "whole", "once"]:
        """split like the weight; whole on every rank; once: whole, added after the all-reduce."""
        if not self.module.bias:
            return "none"
        return {"column": "split", "vocabulary": "split", "row": "once", "replicated": "whole"}[self.style]  # type: ignore[return-value]

    def local_size(self, rank: int) -> int | None:
        """Length of the split dimension on `rank`; None when replicated."""
        return sum(high - low for low, high in self.pieces[rank]) if self.pieces else None

    def local_shape(self, rank: int) -> tuple[int, ...]:
        size = self.local_size(rank)
        return tuple(size if dim == self.dim and size is not None else n for dim, n in enumerate(self.module.shape))


@dataclass(frozen=True)
class TensorParallelPlan:
    """What each of `num_ranks` ranks holds, module by module, in order of registration. `str(plan)` is a table."""

    num_ranks: int
    heads: HeadSplit
    entries: tuple[Entry, ...]

    def __getitem__(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.module.name == name)

    def tensors(self, rank: int) -> Mapping[str, tuple[int, Piece] | None]:
        """Per parameter name its split dimension and `rank`'s ranges of it; None: the whole tensor."""
        found: dict[str, tuple[int, Piece] | None] = {}
        for entry in self.entries:
            name, dim = entry.module.name, entry.dim
            stacked = len(entry.module.shape) > 2
            found[name if stacked else f"{name}.weight"] = None if dim is None else (dim, entry.pieces[rank])
            if entry.module.bias:
                split = (1 if stacked else 0, entry.pieces[rank]) if entry.bias == "split" else None
                found[f"{name}_bias" if stacked else f"{name}.bias"] = split
        return found

    def num_elements(self, rank: int) -> int:
        """Elements of all weights (biases not counted) on `rank`."""
        return sum(_product(entry.local_shape(rank)) for entry in self.entries)

    def __str__(self) -> str:
        """One line per kind of module, equal blocks together: name, count, style, shape, sizes per rank, reason."""
        same: dict[tuple[object, ...], int] = defaultdict(int)
        for entry in self.entries:
            sizes = "" if not entry.pieces else "/".join(str(entry.local_size(rank)) for rank in range(self.num_ranks))
            shape = "x".join(map(str, entry.module.shape))
            unit = f" ({entry.unit})" if entry.unit and entry.unit != entry.style else ""
            same[names.collapsed(entry.module.name), entry.style + unit, shape, sizes, entry.why] += 1
        head = ("module", "count", "style", "shape", "per rank", "because")
        rows = [head, *((name, f"{count}", *rest) for (name, *rest), count in same.items())]
        widths = [max(len(str(row[at])) for row in rows) for at in range(len(head))]
        lines = [
            "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        total = sum(_product(entry.module.shape) for entry in self.entries)
        shares = ", ".join(f"{self.num_elements(rank) / max(total, 1):.0%}" for rank in range(self.num_ranks))
        return "\n".join([*lines, f"{total:,} elements of weights; each rank holds {shares}"])


def plan_tensor_parallel(
    modules: Sequence[ModuleInfo],
    facts: ModelFacts,
    num_ranks: int,
    *,
    grain: int = 64,
    rules: Sequence[Rule] = (),
    shard_vocabulary: bool = True,
) -> TensorParallelPlan:
    """Plan a model. `modules` in order of registration (upstream's rule looks at what follows what).

    `grain`: features of MLPs and the vocabulary are split at multiples of it where there are enough (fast kernels and
    groups of quantised weights want that); `rules` go before names. ModelError says what cannot be split and why.
    """
    if num_ranks < 1 or grain < 1:
        raise ModelError(f"{num_ranks} ranks, grain {grain}; expected at least 1")
    planner = _Planner(facts, split_heads(facts.num_heads, facts.num_kv_heads, num_ranks), num_ranks, grain)
    roles = _Roles(modules, facts, rules, shard_vocabulary and (facts.vocab_size or 0) >= num_ranks)
    entries = tuple(planner.entry(module, *roles.of(module)) for module in modules)
    if num_ranks > 1:
        _check(entries)
        _check_norms(entries, facts)
    return TensorParallelPlan(num_ranks, planner.heads, entries)


class _Roles:
    """Who is what, by rules, names and neighbours."""

    def __init__(
        self, modules: Sequence[ModuleInfo], facts: ModelFacts, rules: Sequence[Rule], vocabulary: bool
    ) -> None:
        self.facts, self.rules, self.vocabulary = facts, rules, vocabulary
        self.before_norm = {
            here.name
            for here, after in _neighbours(modules)
            if after.kind == "layer_norm" or (after.kind == "norm" and names.is_layer_norm(after.name))
        }
        self.attention: set[str] = set()
        self.row_inputs: dict[str, set[int]] = defaultdict(set)
        for module in modules:
            if _is_linear(module) and names.block_of(module.name):
                if names.is_query(module.name) or names.is_qkv(module.name):
                    self.attention.add(module.name.rpartition(".")[0].removesuffix(".self"))
                if names.is_row(module.name):
                    self.row_inputs[names.block_of(module.name)].add(module.num_in)

    def of(self, module: ModuleInfo) -> tuple[Style, Unit, str]:
        name = module.name
        rule = next((rule for rule in self.rules if re.search(rule.pattern, name)), None)
        if rule is not None:
            unit = rule.unit or self._unit(module, rule.style)
            return rule.style, unit if rule.style != "replicated" else "", f"rule {rule.pattern!r}"
        if module.kind == "embedding":
            if self.vocabulary and module.shape[0] == self.facts.vocab_size and not names.is_position(name):
                return "vocabulary", "vocabulary", "embedding of the vocabulary"
            return "replicated", "", "embedding of something else than the vocabulary, or not to be split"
        if not _is_linear(module):
            return "replicated", "", module.kind
        if not names.block_of(name):
            if self.vocabulary and module.num_out == self.facts.vocab_size:
                return "vocabulary", "vocabulary", "makes the vocabulary"
            return "replicated", "", _OUTSIDE
        if names.is_replicated(name):
            return "replicated", "", "router or low rank"
        if names.is_row(name):
            return "row", self._unit(module, "row"), "name"
        if name in self.before_norm and not (names.is_query(name) or names.is_key_or_value(name) or names.is_qkv(name)):
            return "row", self._unit(module, "row"), "stands before a LayerNorm"
        return "column", self._unit(module, "column"), "linear layer of a block"

    def _unit(self, module: ModuleInfo, style: Style) -> Unit:
        name = module.name
        if style == "vocabulary":
            return "vocabulary"
        if style == "row":
            return "heads" if self._of_attention(name) else "features"
        if names.is_query(name):
            return "heads"
        if names.is_key_or_value(name):
            return "kv_heads"
        if names.is_qkv(name):
            layout = names.fused_layout(self.facts.model_type)
            if layout is None:
                raise ModelError(
                    f"{name} is a fused query/key/value projection, but its layout is not known for model type "
                    f"{self.facts.model_type!r}; give Rule({names.last(name)!r}, 'column', 'qkv'), or 'groups' where "
                    "queries, key and value of a key/value head stand together"
                )
            return "qkv" if layout == "qkv" else "groups"
        if names.is_fused_pair(name) and module.num_out not in self.row_inputs[names.block_of(name)]:
            return "pair"
        return "features"

    def _of_attention(self, name: str) -> bool:
        block = names.block_of(name)
        scopes = [scope for scope in self.attention if scope != block and name.startswith(scope + ".")]
        return bool(scopes) or (block in self.attention and names.last(name) in ("o_proj", "out_proj"))


@dataclass(frozen=True)
class _Planner:
    """From a role to ranges."""

    facts: ModelFacts
    heads: HeadSplit
    num_ranks: int
    grain: int

    def entry(self, module: ModuleInfo, style: Style, unit: Unit, why: str) -> Entry:
        if style == "replicated":
            return Entry(module, style, unit, why)
        if module.kind != "embedding" and not _is_linear(module):
            raise ModelError(f"{module.name} is of kind {module.kind}; only linear layers and embeddings can be split")
        size = module.shape[0] if module.kind == "embedding" else module.num_in if style == "row" else module.num_out
        return Entry(module, style, unit, why, self._pieces(module, unit, size))

    def _pieces(self, module: ModuleInfo, unit: Unit, size: int) -> tuple[Piece, ...]:
        query, kv, ranks = self.facts.num_heads, self.facts.num_kv_heads, range(self.num_ranks)
        if unit in ("heads", "kv_heads", "qkv", "groups"):
            count = {"heads": query, "kv_heads": kv, "qkv": query + 2 * kv, "groups": query + 2 * kv}[unit]
            if size % count:
                raise ModelError(
                    f"{module.name} has {size} features; expected a multiple of its {count} heads ({query} query and "
                    f"{kv} key/value heads in all): heads must stay whole"
                )
            split = {"heads": self.heads.of_query, "kv_heads": self.heads.of_kv, "qkv": self.heads.of_qkv}
            return tuple(split.get(unit, self.heads.of_groups)(rank, size // count) for rank in ranks)
        if unit == "pair":
            if size % 2:
                raise ModelError(f"{module.name} makes {size} features; expected an even number, gate and up together")
            halves = self._features(module, size // 2)
            return tuple(((low, high), (low + size // 2, high + size // 2)) for low, high in halves)
        return tuple((piece,) for piece in self._features(module, size))

    def _features(self, module: ModuleInfo, size: int) -> tuple[tuple[int, int], ...]:
        try:
            return split_features(size, self.num_ranks, self.grain)
        except ModelError as error:
            raise ModelError(f"{module.name}: {error}") from None


def _check(entries: Sequence[Entry]) -> None:
    """In each block, what rows read is what columns make, and the other way round."""
    blocks: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.style in ("column", "row") and (block := names.block_of(entry.module.name)):
            blocks[block].append(entry)
    for block, members in blocks.items():
        made = {_hidden(entry): entry for entry in members if entry.style == "column"}
        read = {_hidden(entry): entry for entry in members if entry.style == "row"}
        for hidden, entry in made.items():
            if hidden not in read:
                _refuse(entry, f"no row-parallel layer of {block} reads these")
        for hidden, entry in read.items():
            if hidden not in made:
                _refuse(entry, f"no column-parallel layer of {block} makes these")


def _check_norms(entries: Sequence[Entry], facts: ModelFacts) -> None:
    """A norm over the queries or keys of all heads together cannot be computed from one rank's heads."""
    widths = {entry.module.name: entry.module.num_out for entry in entries if entry.unit in ("heads", "kv_heads")}
    for entry in entries:
        module, what = entry.module, names.last(entry.module.name)[0]
        if "norm" in module.kind and names.is_head_norm(module.name):
            width = widths.get(f"{module.name.rpartition('.')[0]}.{what}_proj")
            num_heads = facts.num_heads if what == "q" else facts.num_kv_heads
            if width is not None and num_heads > 1 and module.shape[0] == width:
                raise ModelError(
                    f"{module.name} normalises all {num_heads} heads together ({width} features), which no rank has; "
                    "run this model on one tensor-parallel rank"
                )


def _refuse(entry: Entry, why: str) -> None:
    unit, size = _hidden(entry)
    what = "heads" if unit == "heads" else f"{size} features"
    raise ModelError(
        f"{entry.module.name} is {entry.style}-parallel ({entry.why}) over {what}, but {why}; give a Rule for it "
        "('replicated' is always right) or for its partner"
    )


def _hidden(entry: Entry) -> tuple[str, int]:
    """What stands between column and row: heads, or so many features."""
    if entry.unit in ("heads", "kv_heads", "qkv", "groups"):
        return "heads", 0
    size = entry.module.num_in if entry.style == "row" else entry.module.num_out
    return "features", size // 2 if entry.unit == "pair" else size


def _neighbours(modules: Sequence[ModuleInfo]) -> list[tuple[ModuleInfo, ModuleInfo]]:
    """Linear layers of a block with the linear layer or norm that is registered next in it."""
    known = [module for module in modules if _is_linear(module) or "norm" in module.kind]
    pairs = pairwise(known)
    return [
        (here, after)
        for here, after in pairs
        if _is_linear(here) and names.block_of(here.name) and names.block_of(here.name) == names.block_of(after.name)
    ]


def _is_linear(module: ModuleInfo) -> bool:
    return module.kind in ("linear", "linear_t")


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
