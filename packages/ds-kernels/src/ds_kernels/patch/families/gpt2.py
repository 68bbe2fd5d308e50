"""GPT-2: its gelu, eight passes in transformers, in one; attention; the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from ds_kernels.patch.forwards import activation, flash_interface, no_interface
from ds_kernels.patch.losses import causal_lm, causal_unfit
from ds_kernels.patch.rules import Family, Rule

__all__ = ["FAMILY"]


def _not_gelu(module: Any) -> str | None:
    if activation(module.act) not in ("tanh", "none"):
        return f"its activation is {type(module.act).__name__}; known is gelu"
    return None


def _mlp(module: Any, _original: Callable[..., Any]) -> Callable[..., Any]:
    """dropout(proj(gelu(fc(x)))) with torch's fused gelu."""
    kind = str(activation(module.act))

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        result: Tensor = self.dropout(self.c_proj(functional.gelu(self.c_fc(hidden_states), approximate=kind)))
        return result

    return forward


FAMILY = Family(
    "gpt2",
    (
        Rule("mlp", "GPT2MLP", _mlp, _not_gelu),
        Rule("attention", "GPT2Attention", flash_interface, no_interface),
        Rule("loss", "GPT2LMHeadModel", causal_lm("transformer", "CausalLMOutputWithCrossAttentions"), causal_unfit),
    ),
)
