"""`read_decoder`: a Hugging Face causal language model as a `Decoder`.

Nothing is guessed: the family is known by model_type, what the configuration says is checked, every parameter of the
model has to be used, and sizes have to fit together. What does not is a ModelError, and the model is as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_inference.decoder.borrow import Borrowing
from ds_inference.decoder.decoder import Decoder
from ds_inference.decoder.families import FAMILIES, Family, family_of
from ds_inference.decoder.rope import rope_tables
from ds_inference.decoder.weights import WeightReader, dtype_of, inputs_of, outputs_of
from ds_inference.errors import ModelError
from ds_inference.quantization import QuantizationSpec
from ds_kernels import DecodeLayer, DecodeModel, RopeTable
from ds_kernels.ops.decode.model import Activation

__all__ = ["read_decoder"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_decoder(
    model: nn.Module, quantization: QuantizationSpec | None = None, *, borrowing: Borrowing | None = None
) -> Decoder:
    """Read a model of transformers.

    Its weights are used where they are, or become views of fused ones: values, names and gradients of the model's
    parameters stay as they are, `Decoder.revert` undoes it. After moving or casting the model it has to be read again.
    A model split over tensor-parallel ranks is read as this rank's part, by all ranks alike.

    Args:
        model: a causal language model (`AutoModelForCausalLM`) of a known family, all parameters on one device.
        quantization: which linear layers are quantised on the way; they are replaced by `QuantizedLinear` in the model.
            Layers that are quantised already are read as they are.
        borrowing: the model is its owner's, who trains it: nothing of it is changed. Fused weights are views where the
            owner's memory allows it, else copies (`Decoder.copied_nbytes`), for which it is to be read again after an
            update; linear layers may have low-rank adapters. Not with `quantization`.

    Returns:
        Decoder.

    Raises:
        ModelError: another family, a configuration or a module that is not as the family's, a parameter that is not
            known, weights that are not loaded.
    """
    if borrowing is not None and quantization is not None:
        raise ModelError("a lent model stays as it is, so it cannot be quantised; leave quantization out")
    config = getattr(model, "config", None)
    family = family_of(config)
    if family is None or config is None:
        kind = getattr(config, "model_type", None)
        raise ModelError(
            f"{type(model).__name__} has the model type {kind!r}; known are {', '.join(FAMILIES)}. "
            "Leave kernel injection out for it"
        )
    _check_config(config, family)
    dry = WeightReader(model, quantization, dry=True, borrowing=borrowing)
    read, _ = _read(model, config, family, dry)
    if names := dry.left_over():
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise ModelError(
            f"{names[0]}{more}: a {config.model_type} decoder has no such parameter, and its result would be missing; "
            "merge or remove what was added to the model"
        )
    _check_sizes(read, model)
    reader = WeightReader(model, quantization, dry=False, borrowing=borrowing)
    data, limit = _read(model, config, family, reader)
    return Decoder(
        data,
        config=config,
        max_positions=limit,
        parallel=reader.parallel,
        activation_bits=reader.activation_bits,
        bound=reader.bound(),
        restore=reader.restore,
        copied_nbytes=reader.copies.nbytes,
    )


def _read(model: nn.Module, config: Any, family: Family, reader: WeightReader) -> tuple[DecodeModel, int]:
    """The model as data, and how many positions it has."""
    trunk = _part(model, family.trunk)
    layers: list[nn.Module] = list(_part(trunk, family.layers).children())
    embedding = _part(trunk, family.embedding)
    weight = reader.embedding(embedding)
    positions, limit = None, int(config.max_position_embeddings)
    tables: list[RopeTable | None]
    if family.positions is not None:
        positions = reader.table(_part(trunk, family.positions))
        tables, limit = [None] * len(layers), positions.shape[0] - family.position_offset
    else:
        tables, limit = rope_tables(_part(trunk, "rotary_emb"), config, len(layers), family.rope_layers)
    read = [
        _layer(layer, family, reader, table, _window(config, family, index))
        for index, (layer, table) in enumerate(zip(layers, tables, strict=True))
    ]
    attention = [_part(layer, family.parts.attention) for layer in layers]
    head_dim, scale = _shared(attention, "head_dim", reader), _shared(attention, "scaling", reader)
    heads = inputs_of(read[0].output) // head_dim
    return DecodeModel(
        embedding=weight,
        layers=read,
        final_norm=reader.norm(_part(trunk, family.final_norm), family.norm, family.norm_offset),
        head=reader.projection([_head(model)]),
        heads=heads,
        kv_heads=(outputs_of(read[0].qkv) // head_dim - heads) // 2,
        head_dim=head_dim,
        activation=_activation(config, family),
        gated=family.gated,
        attention_scale=float(scale),
        attention_softcap=config.attn_logit_softcapping if family.attention_softcap else None,
        logit_softcap=config.final_logit_softcapping if family.logit_softcap else None,
        embedding_scale=_scale(embedding),
        positions=positions,
        position_offset=family.position_offset,
    ), limit


def _layer(
    layer: nn.Module, family: Family, reader: WeightReader, rope: RopeTable | None, window: int | None
) -> DecodeLayer:
    def norm(name: str | None) -> Any:
        return None if name is None else reader.norm(_part(layer, name), family.norm, family.norm_offset)

    parts = family.parts
    heads, outs = parts.head_norms or (None, None), parts.out_norms or (None, None)
    if heads[0] is not None and _missing(layer, heads[0]):
        heads = (None, None)
    return DecodeLayer(
        attention_norm=norm(parts.attention_norm),
        qkv=reader.projection([_part(layer, name) for name in parts.qkv]),
        output=reader.projection([_part(layer, parts.output)]),
        mlp_norm=norm(parts.mlp_norm),
        up=reader.projection([_part(layer, name) for name in parts.up]),
        down=reader.projection([_part(layer, parts.down)]),
        query_norm=norm(heads[0]),
        key_norm=norm(heads[1]),
        attention_out_norm=norm(outs[0]),
        mlp_out_norm=norm(outs[1]),
        rope=rope,
        window=window,
    )


def _part(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{type(module).__name__} has no module {name!r}, which its model type has") from None


def _missing(module: nn.Module, name: str) -> bool:
    """Whether an optional module is not there."""
    owner, _, last = name.rpartition(".")
    return getattr(_part(module, owner), last, None) is None


def _head(model: nn.Module) -> nn.Module:
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(model).__name__} has no output layer over a vocabulary; expected a causal LM")
    return head


def _shared(attention: list[nn.Module], key: str, reader: WeightReader) -> Any:
    """What all layers have in common."""
    values = [getattr(module, key) for module in attention]
    for module, value in zip(attention, values, strict=True):
        if value != values[0]:
            raise ModelError(
                f"{reader.name(module)}.{key} is {value}, that of the first layer {values[0]}; expected one"
            )
    return values[0]


def _scale(embedding: nn.Module) -> float:
    """An embedding's factor, which some classes have."""
    scale: Any = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return 1.0 if scale is None else float(scale)


def _window(config: Any, family: Family, index: int) -> int | None:
    if family.window == "none":
        return None
    size: int | None = getattr(config, "sliding_window", None)
    if family.window == "config":
        return size
    kind = config.layer_types[index]
    if kind not in ("full_attention", "sliding_attention"):
        raise ModelError(f"layer_types[{index}] is {kind!r}; known are full_attention and sliding_attention")
    return size if kind == "sliding_attention" else None


def _activation(config: Any, family: Family) -> Activation:
    name = getattr(config, family.activation)
    if name not in _ACTIVATIONS:
        raise ModelError(f"{family.activation} is {name!r}; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _check_config(config: Any, family: Family) -> None:
    for key, expected in family.demands:
        value = getattr(config, key, expected)
        if (value or False) != expected:
            raise ModelError(
                f"{config.model_type} with {key}={value!r} computes something else than the decoder does, which "
                f"supports {expected!r}; leave kernel injection out for it"
            )


def _check_sizes(model: DecodeModel, source: nn.Module) -> None:
    """Sizes that belong together do, and all weights are of one dtype and on one device."""
    places = {parameter.device for parameter in source.parameters()}
    if len(places) > 1:
        raise ModelError(f"the model is on several devices ({', '.join(map(str, places))}); expected one")
    assert isinstance(model.embedding, Tensor)
    dtype, hidden = model.embedding.dtype, model.embedding.shape[1]
    if dtype not in _FLOATS:
        raise ModelError(f"the embedding is of dtype {dtype}; expected a float of 16 bits or more")
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if model.kv_heads < 1 or model.heads % model.kv_heads:
        raise ModelError(f"{model.heads} query heads for {model.kv_heads} key/value heads; expected a multiple")
    for index, layer in enumerate(model.layers):
        features = inputs_of(layer.down)
        expected = {
            "qkv": (query + 2 * key, hidden),
            "output": (hidden, query),
            "up": (features * (2 if model.gated else 1), hidden),
            "down": (hidden, features),
        }
        for name, shape in expected.items():
            projection = getattr(layer, name)
            found = outputs_of(projection), inputs_of(projection)
            if found != shape or dtype_of(projection) not in (dtype, None):
                raise ModelError(f"layer {index}: {name} is {dtype_of(projection)} {found}; expected {dtype} {shape}")
    if inputs_of(model.head) != hidden or dtype_of(model.head) not in (dtype, None):
        raise ModelError(f"the head has {inputs_of(model.head)} inputs; expected {hidden}, the embedding's features")
