"""Causal language models of transformers as pipeline layers, without rewriting the model and without importing it.

`split_causal_lm(model)` finds the parts of a decoder-only model by what they are (the list of like blocks, the norm
after it, the input and the output embedding) and makes layers of them:

    Embedding      tokens -> their embeddings
    Preparation    the decoder's own forward up to its first block (positions, rotary angles, masks, dropout): its
                   blocks are replaced by recorders, so it is the model's code that says what each block is called with
    DecoderBlock   one block, called as recorded
    FinalNorm      the norm after the blocks
    Head           the model's own forward around its output embedding, so that scales and soft caps are kept

Between stages goes the *state*: the hidden states and the recorded arguments, each kind of call once ("calls", and
"which" of them a block takes). A tied output embedding is a `TiedLayerSpec` with the input embedding.

Invariants. Logits, loss and gradients have the bits of the model's own. A parameter is named by its layer's index and
its name in the model (`5.model.layers.3.mlp.up_proj.weight`; tied: `tied_modules.embedding.NAME`): `huggingface_name`.
A model that does something between or after its blocks which the layers would miss is refused, at the first forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_pipe._weights import SavedWeights
from ds_pipe.errors import PartitionError, PipelineError
from ds_pipe.layers import LayerSpec, TiedLayerSpec

__all__ = ["causal_lm_loss", "huggingface_name", "split_causal_lm"]

_IGNORED = -100  # label of a token that does not count
_TIE = "embedding"


def split_causal_lm(model: nn.Module, weights: str | Path | None = None) -> list[LayerSpec]:
    """The layers of `model` (LlamaForCausalLM, GPT2LMHeadModel and the like), for a `PipelineModule`.

    The first layer takes token numbers [batch, length], or a dict of them ("input_ids") and further arguments of the
    model's forward such as "attention_mask"; the last returns logits [batch, length, vocabulary].

    Without `weights` the layers are the model's own modules: drop the model to keep only this stage of it. With the
    folder of its safetensors files, layers are read from there when they are built, so that a rank never holds more
    than its own; the model then comes from its configuration under `parameters_on_meta`. The files must have the
    model's own names: the few kinds that transformers renames as it reads (GPT-NeoX) are to be loaded by it.

    PartitionError for a model in which the parts cannot be told.
    """
    parts = _Anatomy.of(model)
    read = None if weights is None else SavedWeights(Path(weights))
    first: LayerSpec
    last: LayerSpec
    embedding = partial(Embedding, parts.embedding, model.get_submodule(parts.embedding))
    if parts.tied:
        first = _TiedPiece(Embedding, embedding, read, parts)
        last = _TiedPiece(Embedding, embedding, read, parts, partial(_tied_head, _Around(model, parts)))
    else:
        first = _Piece(Embedding, embedding, read)
        last = _Piece(Head, lambda: Head(model, parts), read)
    blocks = [
        _Piece(DecoderBlock, partial(DecoderBlock, f"{parts.blocks}.{index}", index, block), read)
        for index, block in enumerate(_blocks(model, parts))
    ]
    norm = _Piece(FinalNorm, partial(FinalNorm, parts.norm, model.get_submodule(parts.norm)), read)
    return [first, _Piece(Preparation, lambda: Preparation(model, parts), read), *blocks, norm, last]


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the next token, as transformers computes it from labels that are not shifted.

    `logits` [batch, length, vocabulary], `labels` [batch, length] int64, -100 where a token does not count; the result
    is an fp32 scalar.
    """
    shifted = nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:].contiguous()
    logits = logits.float().view(-1, logits.shape[-1])
    return nn.functional.cross_entropy(logits, shifted.view(-1).to(logits.device), ignore_index=_IGNORED)


def huggingface_name(name: str) -> str:
    """The name in the whole model of `name`, a parameter or buffer of a `PipelineModule` of `split_causal_lm`."""
    head, _, rest = name.partition(".")
    return rest.partition(".")[2] if head == "tied_modules" else rest


class _Part(nn.Module):
    """A layer that holds modules of the model under their names there."""

    def hold(self, path: str, module: nn.Module) -> None:
        """Register `module` as `path`, a name with dots."""
        owner: nn.Module = self
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(name, module)


class Embedding(_Part):
    """Token numbers, or a dict with "input_ids" -> dict with "inputs_embeds" and what else was given."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.hold(path, module)

    def forward(self, inputs: Any) -> dict[str, Any]:
        given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
        if not isinstance(given.get("input_ids"), Tensor):
            raise PipelineError(
                f"a causal language model was given {type(inputs).__name__}; expected a tensor of token numbers, or a "
                "dict with the tensor 'input_ids' and further arguments of the model's forward"
            )
        return {"inputs_embeds": self.get_submodule(self.path)(given.pop("input_ids")), **given}


class Preparation(_Part):
    """What the decoder does before its first block -> the state."""

    def __init__(self, model: nn.Module, parts: _Anatomy) -> None:
        super().__init__()
        self.path = parts.decoder
        self._tape: list[tuple[Tensor, list[Any], dict[str, Any]]] = []
        decoder = _shell(model.get_submodule(parts.decoder))
        for name, module in list(decoder._modules.items()):
            path = f"{parts.decoder}.{name}"
            if path == parts.blocks:
                recorders = [_Recorder(block, self._tape) for block in _blocks(model, parts)]
                decoder._modules[name] = nn.ModuleList(recorders)
            elif path == parts.norm:
                decoder._modules[name] = nn.Identity()
            elif parts.embedding == path or module is None:
                del decoder._modules[name]
        self.hold(parts.decoder, decoder)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._tape.clear()
        decoder = self.get_submodule(self.path)
        outputs = decoder(**inputs, use_cache=False)
        calls: list[dict[str, Any]] = []
        which: list[int] = []
        for _, args, kwargs in self._tape:
            call = {"args": args, "kwargs": kwargs}
            known = next((at for at, other in enumerate(calls) if _same(call, other)), None)
            if known is None:
                calls.append(call)
            which.append(len(calls) - 1 if known is None else known)
        hidden = [entry[0] for entry in self._tape]
        self._tape.clear()
        if len(hidden) == 0 or any(one is not hidden[0] for one in hidden):
            raise PipelineError(f"{type(decoder).__name__} does something between its blocks and cannot be split")
        last = outputs[0]
        if last.shape != hidden[0].shape or last.data_ptr() != hidden[0].data_ptr():
            raise PipelineError(f"{type(decoder).__name__} does more after its blocks than a norm and cannot be split")
        return {"hidden": hidden[0], "calls": calls, "which": which}


class DecoderBlock(_Part):
    """One block: the state in, the state with new hidden states out."""

    def __init__(self, path: str, index: int, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.index = index
        self.hold(path, module)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        call = state["calls"][state["which"][self.index]]
        hidden = self.get_submodule(self.path)(state["hidden"], *call["args"], **call["kwargs"])
        return {**state, "hidden": hidden[0] if isinstance(hidden, tuple) else hidden}


class FinalNorm(_Part):
    """The state -> normed hidden states."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.hold(path, module)

    def forward(self, state: dict[str, Any]) -> Tensor:
        hidden: Tensor = self.get_submodule(self.path)(state["hidden"])
        return hidden


class Head(_Part):
    """Normed hidden states -> logits, by an output embedding of its own."""

    def __init__(self, model: nn.Module, parts: _Anatomy) -> None:
        super().__init__()
        self.path = parts.head
        self.hold(parts.head, model.get_submodule(parts.head))
        self._around = _Around(model, parts)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._around(self.get_submodule(self.path), hidden, self.training)


def _tied_head(around: _Around, shared: nn.Module, hidden: Tensor) -> Tensor:
    """Logits by the input embedding's weight. `shared` is the `Embedding` that both uses share."""
    assert isinstance(shared, Embedding)
    return around(_Projection(shared.get_parameter(f"{shared.path}.weight")), hidden, shared.training)


@dataclass(frozen=True)
class _Anatomy:
    """Where the parts are: names with dots, from the model."""

    decoder: str
    blocks: str
    embedding: str
    norm: str
    head: str
    tied: bool

    @classmethod
    def of(cls, model: nn.Module) -> _Anatomy:
        kind = type(model).__name__
        names = {id(module): name for name, module in model.named_modules()}
        embedding, head = (_ask(model, verb) for verb in ("get_input_embeddings", "get_output_embeddings"))
        blocks = _find_blocks(model)
        decoder = blocks.rpartition(".")[0]
        where, output = names.get(id(embedding), ""), names.get(id(head), "")
        if not decoder or where.rpartition(".")[0] != decoder or not output or "." in output:
            raise PartitionError(
                f"{kind} is no causal language model that can be split; expected a decoder with an embedding and a "
                "list of blocks inside a model with an output embedding, such as LlamaForCausalLM or GPT2LMHeadModel"
            )
        children = list(model.get_submodule(decoder).named_children())
        after = children[[name for name, _ in children].index(blocks.rpartition(".")[2]) + 1 :]
        norms = [name for name, module in after if "norm" in type(module).__name__.lower()]
        if len(norms) != 1:
            raise PartitionError(f"{kind}: {len(norms)} norms follow {blocks} in {decoder}; expected one to split it")
        tied = getattr(head, "weight", None) is getattr(embedding, "weight", 0)
        if tied and len(list(head.parameters())) > 1:
            raise PartitionError(
                f"{kind}: the tied output embedding has weights of its own; expected the tied one only"
            )
        return cls(decoder, blocks, where, f"{decoder}.{norms[0]}", output, tied)


def _ask(model: nn.Module, verb: str) -> nn.Module:
    found = getattr(model, verb, lambda: None)()
    return found if isinstance(found, nn.Module) else nn.Module()


def _find_blocks(model: nn.Module) -> str:
    """The outermost list of the number of layers that the configuration says; "" when there is none."""
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    lists = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return next((name for name, module in lists if len(module) == count), "")


def _blocks(model: nn.Module, parts: _Anatomy) -> list[nn.Module]:
    found = model.get_submodule(parts.blocks)
    assert isinstance(found, nn.ModuleList)
    return list(found)


def _shell(module: nn.Module) -> nn.Module:
    """A module with the code and attributes of `module` whose children can be replaced without touching it."""
    made = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        made.__dict__[name] = dict(module.__dict__[name])
    return made


class _Recorder(nn.Module):
    """In a block's place: notes what it is called with and hands the hidden states on."""

    def __init__(self, block: nn.Module, tape: list[tuple[Tensor, list[Any], dict[str, Any]]]) -> None:
        super().__init__()
        for name, value in vars(block).items():  # what a decoder asks of its blocks: kinds of attention and the like
            if isinstance(value, bool | int | float | str) and name not in self.__dict__:
                setattr(self, name, value)
        self._tape = tape

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
        self._tape.append((hidden, list(args[1:]), kwargs))
        return hidden


class _Around:
    """The model's own forward without its decoder: from normed hidden states to logits."""

    def __init__(self, model: nn.Module, parts: _Anatomy) -> None:
        self._shell = _shell(model)
        self._given = _Given()
        self._head = parts.head
        for name in self._shell._modules:
            if parts.head != name:
                self._shell._modules[name] = self._given if name == parts.decoder.partition(".")[0] else nn.Identity()
        self._shell._modules[parts.head] = nn.Identity()

    def __call__(self, head: nn.Module, hidden: Tensor, training: bool) -> Tensor:
        self._shell._modules[self._head] = head
        self._shell.training = training
        self._given.hidden = hidden
        try:
            logits: Tensor = self._shell(inputs_embeds=hidden, use_cache=False).logits
        finally:
            self._given.hidden = None
            self._shell._modules[self._head] = nn.Identity()
        return logits


class _Given(nn.Module):
    """In the decoder's place: returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> _Outputs:
        return _Outputs(self.hidden)


class _Outputs:
    """What a decoder returns, of which only the hidden states are there."""

    def __init__(self, hidden: Tensor | None) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Projection(nn.Module):
    """An output embedding with a weight that it does not own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.__dict__["weight"] = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.__dict__["weight"])


class _Piece(LayerSpec):
    """A layer that is made from the model, and read when built if there is a folder of weights."""

    def __init__(self, kind: type[nn.Module], make: Callable[[], nn.Module], weights: SavedWeights | None) -> None:
        super().__init__(kind)
        self._make = make
        self._weights = weights

    def build(self) -> nn.Module:
        return _built(self._make, self._weights)


class _TiedPiece(TiedLayerSpec):
    """The input embedding, as itself or as the output embedding."""

    def __init__(
        self,
        kind: type[nn.Module],
        make: Callable[[], nn.Module],
        weights: SavedWeights | None,
        parts: _Anatomy,
        use: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__(_TIE, kind, forward_fn=use, tied_weight_attr=f"{parts.embedding}.weight")
        self._make = make
        self._weights = weights

    def build(self) -> nn.Module:
        return _built(self._make, self._weights)


def _built(make: Callable[[], nn.Module], weights: SavedWeights | None) -> nn.Module:
    made = make()
    if weights is None or torch.get_default_device().type == "meta":
        return made
    made = copy.deepcopy(made)
    weights.fill(made)
    return made


def _same(one: Any, other: Any) -> bool:
    """Equal, where tensors are so only if they are the same object."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
