"""The forward methods that several families share: norms, gated MLPs, rotary embedding, attention.

Each computes what the class it is for computes, with one rounding where that has several.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = [
    "activation", "flash_interface", "gated_mlp", "no_interface", "no_rope", "not_gated", "rms_norm_with",
    "rotary_attention",
]  # fmt: skip

ROPE = "apply_rotary_pos_emb"
"""What the attention of every rotary model calls, with `(q, k, cos, sin)`."""
INTERFACES = "ALL_ATTENTION_FUNCTIONS"
"""Where every attention looks up its implementation."""

Forward = Callable[..., Any]


def rms_norm_with(eps: str, offset: float) -> Callable[[Any, Forward], Forward]:
    """The forward of a norm whose epsilon is in the attribute `eps` and whose weight is stored less `offset`."""

    def make(_module: Any, _original: Forward) -> Forward:
        from ds_kernels.ops.rms_norm import rms_norm

        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            return rms_norm(hidden_states, self.weight, getattr(self, eps), offset=offset)

        return forward

    return make


def activation(module: Any) -> str | None:
    """What an activation function of transformers or torch computes: "silu", "tanh" (gelu), "none" (gelu), or None."""
    name = type(module).__name__
    if name in ("SiLUActivation", "SiLU"):
        return "silu"
    if name in ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh", "FastGELUActivation"):
        return "tanh"
    if name == "GELU":
        return str(module.approximate)
    return "none" if name == "GELUActivation" else None


def not_gated(module: Any) -> str | None:
    """Why a gated MLP cannot be replaced."""
    if activation(module.act_fn) is None:
        return f"its activation is {type(module.act_fn).__name__}; known are silu and gelu"
    return None


def gated_mlp(module: Any, _original: Forward) -> Forward:
    """down(act(gate(x)) * up(x)), the middle in one pass."""
    from ds_kernels.ops.glu import geglu, swiglu

    kind = activation(module.act_fn)

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        middle = swiglu(gate, up) if kind == "silu" else geglu(gate, up, str(kind))
        result: Tensor = self.down_proj(middle)
        return result

    return forward


def no_rope(module: Any) -> str | None:
    """Why an attention's rotary embedding cannot be replaced."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or ROPE not in code.co_names:
        return f"its forward does not call {ROPE}"
    return None


def rotary_attention(_module: Any, original: Forward) -> Forward:
    """The attention's own forward, in which the name `apply_rotary_pos_emb` means `rope`.

    Its code is bound to a copy of its module's globals, so that other models are left alone and everything else in it
    (projections, caches, masks) is what this release of transformers does.
    """
    from ds_kernels.ops.rope import rope

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2  # transformers stores every angle twice
        cos, sin = cos[..., :half], sin[..., :half]
        if unsqueeze_dim == 2:
            q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)
        return rope(q, k, cos, sin)

    return _rebound(original, ROPE, apply_rotary_pos_emb)


def _rebound(function: Any, name: str, value: Any) -> Forward:
    """A function of the same code for which a global name means something else."""
    names = {**function.__globals__, name: value}
    names.pop("__name__", None)  # torch.compile would look its globals up in the module of that name instead
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__, twin.__module__ = function.__kwdefaults__, __name__
    return twin


def no_interface(module: Any) -> str | None:
    """Why an attention's implementation cannot be replaced."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or INTERFACES not in code.co_names:
        return f"its forward does not look up {INTERFACES}"
    return None


def flash_interface(_module: Any, original: Forward) -> Forward:
    """The attention's own forward, in which the implementation "sdpa" is `flash_attention` wherever that fits."""
    plain: Any = original
    return _rebound(original, INTERFACES, _Interfaces(plain.__globals__[INTERFACES]))


class _Interfaces:
    """transformers' table of attention implementations, with its "sdpa" replaced."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def get_interface(self, implementation: str, default: Forward) -> Forward:
        """As the table's."""
        found: Forward = self._table.get_interface(implementation, default)
        return functools.partial(_attention, found) if implementation == "sdpa" else found


def _attention(
    plain: Forward, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **options: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Attention of a whole sequence to itself; anything else goes to the plain implementation."""
    from ds_kernels.ops.flash_attention import flash_attention

    special = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    if attention_mask is not None or dropout or special or query.shape[2] != key.shape[2]:
        given: tuple[Tensor, Any] = plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return given
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    found = flash_attention(query, key, value, causal=bool(causal) and query.shape[2] > 1, scale=scaling)
    return found.transpose(1, 2).contiguous(), None
