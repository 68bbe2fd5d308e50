"""The forward methods that several families share: norms, gated MLPs, rotary embedding.

Each computes what the class it is for computes, with one rounding where that has several.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["ROPE", "activation", "gated_mlp", "no_rope", "not_gated", "rms_norm_with", "rotary_attention"]

ROPE = "apply_rotary_pos_emb"
"""What the attention of every rotary model calls, with `(q, k, cos, sin)`."""

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
    (caches, masks, attention implementations) is what this release of transformers does.
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

    plain: Any = original
    names = {**plain.__globals__, ROPE: apply_rotary_pos_emb}
    forward = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__, forward.__module__ = plain.__kwdefaults__, __name__
    return forward
