"""A causal language model's decoder as data: what `decode` computes, and with which weights.

Vocabulary: a *projection* is a linear layer, its weight [outputs, inputs] dense or quantised; *fused* projections hold
the rows of several one after the other (queries, keys, values; gate, up). Every layer computes

    h = norm(x);  a = output(attention(qkv(h)));  x = x + a;  x = x + down(act(up(norm(x))))

with the variations that the fields name. Nothing here knows a model family: who reads a model fills this in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ds_kernels.ops.linear.weight import QuantizedWeight

__all__ = ["Activation", "DecodeLayer", "DecodeModel", "Norm", "Projection", "RopeTable"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMS norm x / rms(x) * (weight + offset), or layer norm with a weight and a bias.

    Attributes:
        weight: [features], a float dtype.
        bias: [features], or None; layer norm only.
        eps: added to the mean square or the variance.
        kind: "rms" or "layer".
        offset: added to the weight, 1.0 for Gemma's RMS norm.
    """

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-6
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear layer: x @ weight.T + bias.

    Attributes:
        weight: [outputs, inputs], dense and contiguous, or quantised.
        bias: [outputs], or None.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class RopeTable:
    """Rotary embedding of the first 2 * width features of a head, in halves (feature i turns with i + width).

    Attributes:
        cos: [positions, width] fp32, the attention scaling of long-context variants included.
        sin: as cos.
    """

    cos: Tensor
    sin: Tensor


@dataclasses.dataclass(frozen=True)
class DecodeLayer:
    """One layer.

    Attributes:
        attention_norm: before attention.
        qkv: rows: heads * head_dim of queries, then kv_heads * head_dim of keys, then as many of values.
        output: after attention, [hidden, heads * head_dim].
        mlp_norm: before the MLP; None: the MLP reads what attention_norm gave, and both results are added to x (Phi).
        up: [intermediate, hidden], or gated [2 * intermediate, hidden]: the gate's rows, then up's.
        down: [hidden, intermediate].
        query_norm, key_norm: over the features of every head, before the rotary embedding (Qwen3); or None.
        attention_out_norm, mlp_out_norm: of the results before they are added to x (Gemma 2, 3); or None.
        rope: None: no rotary embedding.
        window: a query sees this many keys, itself counted; None: all.
    """

    attention_norm: Norm
    qkv: Projection
    output: Projection
    mlp_norm: Norm | None
    up: Projection
    down: Projection
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    rope: RopeTable | None = None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class DecodeModel:
    """The whole decoder.

    Attributes:
        embedding: [vocabulary, hidden]; a QuantizedWeight when it is tied to a quantised head.
        layers: in order.
        final_norm: before the head.
        head: [vocabulary, hidden]; its weight may be `embedding`.
        heads, kv_heads, head_dim: of attention; heads is a multiple of kv_heads.
        activation: of the MLP.
        gated: act(gate(x)) * up(x) in the MLP, else act(up(x)).
        attention_scale: of the scores; None: 1 / sqrt(head_dim).
        attention_softcap: scores become cap * tanh(score / cap); None: not.
        logit_softcap: the same of logits.
        embedding_scale: factor of the embedding (Gemma), rounded to the embedding's dtype before.
        positions: learned, [positions, hidden], added to the embedding; or None.
        position_offset: rows of `positions` before that of position 0 (OPT: 2).
    """

    embedding: Tensor | QuantizedWeight
    layers: Sequence[DecodeLayer]
    final_norm: Norm
    head: Projection
    heads: int
    kv_heads: int
    head_dim: int
    activation: Activation
    gated: bool
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    positions: Tensor | None = None
    position_offset: int = 0
