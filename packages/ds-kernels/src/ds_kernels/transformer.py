"""The BERT-style training layer under its upstream names: `DeepSpeedTransformerConfig`, `DeepSpeedTransformerLayer`.

One encoder layer, its twelve parameters flat on the module:
    attn_qkvw [3h, h], attn_qkvb   queries, keys and values, in this order     attn_ow [h, h], attn_ob   output
    inter_w [i, h], inter_b        first half of the MLP                       output_w [h, i], output_b second half
    attn_nw, attn_nb               the norm behind the attention               norm_w, norm_b            the other norm

    post-norm:  a = attn_n(x + attention(x));   y = norm(a + mlp(a))                    (BERT: norm is the last step)
    pre-norm:   a = x + attention(norm(x));     y = a + mlp(attn_n(a))                  (norm is the first step)

Every piece runs on this package's operations; without a mask and dropout, attention is `flash_attention`. Dropout
follows torch's default generator (`torch.manual_seed`), so that activation checkpointing replays it. The weights are
those of a Hugging Face BertLayer (`from_bert`, `bert_state_dict`), with the same results.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_kernels._checks import require
from ds_kernels.ops.bias_dropout_residual import bias_dropout_residual
from ds_kernels.ops.bias_gelu import bias_gelu
from ds_kernels.ops.flash_attention import flash_attention
from ds_kernels.ops.layer_norm import layer_norm
from ds_kernels.ops.softmax import softmax

__all__ = ["DeepSpeedTransformerConfig", "DeepSpeedTransformerLayer", "TransformerConfig"]

BERT_NAMES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
"""The modules of a Hugging Face BertLayer, each with a weight and a bias, in the order of `initial_weights`."""
OWN_NAMES = (
    ("attn_ow", "attn_ob"),
    ("attn_nw", "attn_nb"),
    ("inter_w", "inter_b"),
    ("output_w", "output_b"),
    ("norm_w", "norm_b"),
)
"""Our names for `BERT_NAMES[3:]`; the first three are joined in attn_qkvw and attn_qkvb."""


class TransformerConfig:
    """Sizes and initialisation of a layer.

    Attributes:
        layer_id: the number of the layer, counted as layers are made; -1 in a configuration of no layer.
        batch_size: accepted as upstream takes it; any batch size runs.
        hidden_size: h, a multiple of heads.
        intermediate_size: i; 4 h if not positive.
        heads: attention heads.
        attn_dropout_ratio: of the attention weights; none if negative.
        hidden_dropout_ratio: in front of both residual additions; none if negative.
        num_hidden_layers: of the model; what `adjust_init_range` divides by.
        initializer_range: standard deviation of the initial weights; 0.02 if negative.
    """

    def __init__(
        self,
        batch_size: int,
        hidden_size: int,
        intermediate_size: int,
        heads: int,
        attn_dropout_ratio: float,
        hidden_dropout_ratio: float,
        num_hidden_layers: int,
        initializer_range: float,
    ) -> None:
        self.layer_id = -1
        self.batch_size = batch_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.heads = heads
        self.attn_dropout_ratio = attn_dropout_ratio
        self.hidden_dropout_ratio = hidden_dropout_ratio
        self.num_hidden_layers = num_hidden_layers
        self.initializer_range = initializer_range


class DeepSpeedTransformerConfig(TransformerConfig):
    """Configuration of a `DeepSpeedTransformerLayer`, with upstream's names and defaults.

    Attributes:
        layer_norm_eps: of both norms.
        local_rank, seed, fp16, stochastic_mode: accepted as upstream takes them; nothing depends on them: torch's
            current device, its generator and the dtype of the module rule, and every result is deterministic.
        pre_layer_norm: the norms stand in front of attention and MLP, else behind.
        normalize_invertible: norms keep their output, which the next product keeps anyway, instead of their input, and
            recompute from it (weights near zero lose accuracy there). Post-norm only: in front, the sum is kept anyway.
        gelu_checkpoint: the output of gelu is computed again in backward instead of kept.
        adjust_init_range: the two output weights start smaller, by sqrt(2 * num_hidden_layers).
        attn_dropout_checkpoint: with dropout, the attention weights are computed again in backward instead of kept.
        return_tuple: forward returns `(hidden_states,)`.
        training: False switches dropout off, as `layer.eval()` does.
        approximate: of gelu: "none" (as BERT) or "tanh".
    """

    def __init__(
        self,
        batch_size: int = -1,
        hidden_size: int = -1,
        intermediate_size: int = -1,
        heads: int = -1,
        attn_dropout_ratio: float = -1,
        hidden_dropout_ratio: float = -1,
        num_hidden_layers: int = -1,
        initializer_range: float = -1,
        layer_norm_eps: float = 1e-12,
        local_rank: int = -1,
        seed: int = -1,
        fp16: bool = False,
        pre_layer_norm: bool = True,
        normalize_invertible: bool = False,
        gelu_checkpoint: bool = False,
        adjust_init_range: bool = True,
        attn_dropout_checkpoint: bool = False,
        stochastic_mode: bool = False,
        return_tuple: bool = False,
        training: bool = True,
        approximate: str = "none",
    ) -> None:
        super().__init__(
            batch_size, hidden_size, intermediate_size, heads, attn_dropout_ratio, hidden_dropout_ratio,
            num_hidden_layers, initializer_range,
        )  # fmt: skip
        self.layer_norm_eps = layer_norm_eps
        self.local_rank = local_rank
        self.seed = seed
        self.fp16 = fp16
        self.pre_layer_norm = pre_layer_norm
        self.normalize_invertible = normalize_invertible
        self.gelu_checkpoint = gelu_checkpoint
        self.adjust_init_range = adjust_init_range
        self.attn_dropout_checkpoint = attn_dropout_checkpoint
        self.stochastic_mode = stochastic_mode
        self.return_tuple = return_tuple
        self.training = training
        self.approximate = approximate

    @classmethod
    def from_dict(cls, json_object: Mapping[str, Any]) -> DeepSpeedTransformerConfig:
        """A configuration of these keys; a key that is none is an error.

        Raises:
            KernelArgumentError: unknown keys, by name.
        """
        known = vars(cls())
        unknown = sorted(set(json_object) - set(known))
        require(
            not unknown,
            f"DeepSpeedTransformerConfig: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}",
        )
        config = cls()
        vars(config).update(json_object)
        return config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> DeepSpeedTransformerConfig:
        """`from_dict` of a JSON file."""
        with open(json_file, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))


class DeepSpeedTransformerLayer(nn.Module):
    """One encoder layer; see the module's text for its parameters and its two forms."""

    layer_id = 0
    """The number of the next layer."""

    def __init__(
        self,
        config: DeepSpeedTransformerConfig,
        initial_weights: Sequence[Tensor] | None = None,
        initial_biases: Sequence[Tensor] | None = None,
    ) -> None:
        """A layer with new parameters, or with copies of given ones.

        Args:
            config: copied.
            initial_weights: eight tensors: query, key, value, attention output, attention norm, first and second half
                of the MLP, the other norm. With initial_biases, the same in number and order.

        Raises:
            KernelArgumentError: sizes that do not fit, or not eight tensors of both kinds.
        """
        super().__init__()
        self.config = copy.deepcopy(config)
        self.config.layer_id = DeepSpeedTransformerLayer.layer_id
        DeepSpeedTransformerLayer.layer_id += 1
        hidden, heads = config.hidden_size, config.heads
        require(
            hidden > 0 and heads > 0 and hidden % heads == 0,
            f"DeepSpeedTransformerLayer: hidden_size is {hidden} and heads {heads}; expected a multiple of heads",
        )
        if config.intermediate_size <= 0:
            self.config.intermediate_size = 4 * hidden
        inner = self.config.intermediate_size

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.attn_qkvw, self.attn_qkvb = empty(3 * hidden, hidden), empty(3 * hidden)
        self.attn_ow, self.attn_ob = empty(hidden, hidden), empty(hidden)
        self.attn_nw, self.attn_nb = empty(hidden), empty(hidden)
        self.inter_w, self.inter_b = empty(inner, hidden), empty(inner)
        self.output_w, self.output_b = empty(hidden, inner), empty(hidden)
        self.norm_w, self.norm_b = empty(hidden), empty(hidden)
        self.reset_parameters()
        if initial_weights is not None or initial_biases is not None:
            self._copy(initial_weights or (), initial_biases or ())

    def reset_parameters(self) -> None:
        """Weights normal with the configured deviation, biases zero, norms the identity."""
        config = self.config
        deviation = 0.02 if config.initializer_range < 0 else config.initializer_range
        adjust = config.adjust_init_range and config.num_hidden_layers > 0
        output_deviation = deviation / math.sqrt(2.0 * config.num_hidden_layers) if adjust else deviation
        for name, parameter in self.named_parameters():
            if name in ("attn_nw", "norm_w"):
                nn.init.ones_(parameter)
            elif name.endswith("b"):
                nn.init.zeros_(parameter)
            else:
                outputs = name in ("attn_ow", "output_w")
                nn.init.normal_(parameter, std=output_deviation if outputs else deviation)

    def _copy(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        require(
            len(weights) == len(BERT_NAMES) == len(biases),
            f"DeepSpeedTransformerLayer: {len(weights)} initial_weights and {len(biases)} initial_biases; expected 8 "
            f"of each, of {', '.join(BERT_NAMES)}",
        )
        with torch.no_grad():
            self.attn_qkvw.copy_(torch.cat(list(weights[:3])))
            self.attn_qkvb.copy_(torch.cat(list(biases[:3])))
            for (weight, bias), new_weight, new_bias in zip(OWN_NAMES, weights[3:], biases[3:], strict=True):
                self.get_parameter(weight).copy_(new_weight)
                self.get_parameter(bias).copy_(new_bias)

    @classmethod
    def from_bert(cls, bert_layer: nn.Module, **options: Any) -> DeepSpeedTransformerLayer:
        """The layer with the sizes, dropout, dtype, device and weights of a Hugging Face BertLayer.

        Args:
            bert_layer: an encoder's BertLayer, or one with the same names.
            options: of `DeepSpeedTransformerConfig`, beyond those that the layer says.
        """
        parts: Any = bert_layer
        attention, output = parts.attention.self, parts.output
        weight = parts.intermediate.dense.weight
        given = {
            "hidden_size": weight.shape[1],
            "intermediate_size": weight.shape[0],
            "heads": attention.num_attention_heads,
            "attn_dropout_ratio": attention.dropout.p,
            "hidden_dropout_ratio": output.dropout.p,
            "layer_norm_eps": output.LayerNorm.eps,
            "pre_layer_norm": False,
        }
        modules = [bert_layer.get_submodule(name) for name in BERT_NAMES]
        layer = cls(
            DeepSpeedTransformerConfig(**{**given, **options}),
            [cast(Tensor, module.weight).detach() for module in modules],
            [cast(Tensor, module.bias).detach() for module in modules],
        ).to(weight.device, weight.dtype)
        return layer.train(bert_layer.training)

    def bert_state_dict(self) -> dict[str, Tensor]:
        """The parameters by the names of a Hugging Face BertLayer, for its `load_state_dict`."""
        weights = [*self.attn_qkvw.detach().chunk(3)]
        biases = [*self.attn_qkvb.detach().chunk(3)]
        for weight, bias in OWN_NAMES:
            weights.append(self.get_parameter(weight).detach())
            biases.append(self.get_parameter(bias).detach())
        pairs = zip(BERT_NAMES, weights, biases, strict=True)
        return {f"{name}.{kind}": t for name, w, b in pairs for kind, t in (("weight", w), ("bias", b))}

    def extra_repr(self) -> str:
        config = self.config
        form = "pre" if config.pre_layer_norm else "post"
        return f"{config.hidden_size}, intermediate={config.intermediate_size}, heads={config.heads}, {form}-norm"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> Tensor | tuple[Tensor]:
        """One layer.

        Args:
            hidden_states: [batch, tokens, hidden_size].
            attention_mask: broadcastable to [batch, heads, tokens, tokens]: boolean (True: look there) or float (added
                to the scores, as `get_extended_attention_mask` makes it); None: everyone sees everyone.
            unused: arguments that encoders pass along, each None or False: head_mask, encoder_hidden_states,
                past_key_values, output_attentions and so on.

        Returns:
            Like hidden_states; `(hidden_states,)` if `config.return_tuple`.

        Raises:
            KernelArgumentError: another shape, or an unused argument that asks for something.
        """
        config = self.config
        require(
            hidden_states.dim() == 3 and hidden_states.shape[2] == config.hidden_size,
            f"DeepSpeedTransformerLayer: hidden_states has shape {tuple(hidden_states.shape)}; "
            f"expected [batch, tokens, {config.hidden_size}]",
        )
        asked = sorted(name for name, value in unused.items() if value is not None and value is not False)
        require(
            not asked, f"DeepSpeedTransformerLayer: {', '.join(asked)} are given; only None and False are supported"
        )
        x, eps = hidden_states, config.layer_norm_eps
        if config.pre_layer_norm:
            attended = self._attention(layer_norm(x, self.norm_w, self.norm_b, eps), attention_mask)
            total = self._drop_add(attended, self.attn_ob, x)
            normed = layer_norm(total, self.attn_nw, self.attn_nb, eps)
            y = self._drop_add(self._mlp(normed), self.output_b, total)
        else:
            attended = self._attention(x, attention_mask)
            normed = self._norm(self._drop_add(attended, self.attn_ob, x), self.attn_nw, self.attn_nb)
            y = self._norm(self._drop_add(self._mlp(normed), self.output_b, normed), self.norm_w, self.norm_b)
        return (y,) if config.return_tuple else y

    def _dropout(self, ratio: float) -> float:
        return max(0.0, ratio) if self.training and self.config.training else 0.0

    def _drop_add(self, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_residual(x, bias, residual, self._dropout(self.config.hidden_dropout_ratio))

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.config.normalize_invertible and torch.is_grad_enabled():
            y: Tensor = _InvertibleNorm.apply(x, weight, bias, self.config.layer_norm_eps)  # type: ignore[no-untyped-call]
            return y
        return layer_norm(x, weight, bias, self.config.layer_norm_eps)

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of x, without the output's bias."""
        batch, tokens, hidden = x.shape
        heads = self.config.heads
        qkv = F.linear(x, self.attn_qkvw, self.attn_qkvb).view(batch, tokens, 3, heads, hidden // heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(x.dtype)
        dropout = self._dropout(self.config.attn_dropout_ratio)
        if dropout > 0:
            if self.config.attn_dropout_checkpoint:
                context = checkpoint(_attend, q, k, v, mask, dropout, use_reentrant=False)
            else:
                context = _attend(q, k, v, mask, dropout)
        elif mask is None:
            context = flash_attention(q, k, v)
        else:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.linear(context.transpose(1, 2).reshape(batch, tokens, hidden), self.attn_ow)

    def _mlp(self, x: Tensor) -> Tensor:
        """The MLP of x, without the output's bias."""
        inner = F.linear(x, self.inter_w)
        if self.config.gelu_checkpoint and torch.is_grad_enabled():
            y: Tensor = checkpoint(self._gelu_output, inner, use_reentrant=False)
            return y
        return self._gelu_output(inner)

    def _gelu_output(self, inner: Tensor) -> Tensor:
        return F.linear(bias_gelu(inner, self.inter_b, self.config.approximate), self.output_w)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention with dropout of its weights; [batch, heads, tokens, dim]."""
    weights = softmax(q @ k.transpose(-1, -2), mask, scale=q.shape[-1] ** -0.5)
    return bias_dropout_residual(weights, p=dropout) @ v


class _InvertibleNorm(torch.autograd.Function):
    """Layer norm that keeps its output instead of its input: xhat = (y - bias) / weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, _, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(y, weight, bias, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, rstd = ctx.saved_tensors
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        wide, wide_grad = weight.to(dtype), grad.to(dtype)
        xhat = (y.to(dtype) - bias.to(dtype)) / torch.where(wide == 0, 1.0, wide)
        scaled = wide_grad * wide
        pull = scaled.mean(-1, keepdim=True) + xhat * (scaled * xhat).mean(-1, keepdim=True)
        grad_x = (scaled - pull) * rstd.to(dtype)
        grad_weight = (wide_grad * xhat).flatten(0, -2).sum(0)
        return grad_x.to(y.dtype), grad_weight.to(weight.dtype), wide_grad.flatten(0, -2).sum(0).to(bias.dtype), None
