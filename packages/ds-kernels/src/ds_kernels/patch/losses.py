"""Language-model heads whose loss is fused with their last linear layer.

The loss is computed inside the layer's own forward (`head(hidden, target=...)`), so that everything hung on the layer
(hooks that gather a sharded weight, counters) sees a call as before. Only training steps that ask for a loss take this
way; their output has `logits=None`, for the logits were never there. Everything else runs as before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ds_kernels.patch.rules import has_own_forward

__all__ = ["causal_lm", "causal_unfit", "head_forward", "masked_lm", "masked_unfit"]

Forward = Callable[..., Any]


def head_forward(self: Any, x: Tensor, **loss: Any) -> Tensor:
    """A linear layer's forward, or with `target` given the loss of its output."""
    if not loss:
        return functional.linear(x, self.weight, self.bias)
    from ds_kernels.ops.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, self.weight, bias=self.bias, **loss)


head_forward.__name__ = "forward"  # what a pickle of the bound method looks up: it loads as the class's own


def _head_unfit(head: Any) -> str | None:
    if type(head) is not torch.nn.Linear or has_own_forward(head):
        return f"its head is a {type(head).__name__} that is not a plain torch.nn.Linear"
    return None


def causal_unfit(model: Any) -> str | None:
    """Why the loss of a causal language model cannot be fused."""
    if getattr(model.loss_function, "__name__", "") != "ForCausalLMLoss":
        return "its loss_function is not the usual one"
    if getattr(model.config, "final_logit_softcapping", None):
        return "its logits are capped"
    return _head_unfit(model.lm_head)


def masked_unfit(model: Any) -> str | None:
    """Why the loss of a masked language model cannot be fused."""
    return _head_unfit(model.get_output_embeddings())


def _as_before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has to run as it was: no training step, or more by position than the tokens, or a tuple wanted."""
    as_tuple = kwargs.get("return_dict", getattr(model.config, "return_dict", True)) is False
    return not model.training or kwargs.get("labels") is None or len(args) > 1 or as_tuple


def causal_lm(backbone: str, output: str) -> Callable[[Any, Forward], Forward]:
    """For models that are `lm_head(self.<backbone>(...))`; `output` names the class that their forward returns."""

    def make(_model: Any, original: Forward) -> Forward:
        result_class = getattr(sys.modules[original.__module__], output)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            to_keep = kwargs.get("logits_to_keep", 0)
            if _as_before(self, args, kwargs) or not isinstance(to_keep, int) or to_keep:
                return original(self, *args, **kwargs)
            rest = {name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep")}
            found = getattr(self, backbone)(*args, **rest)
            loss = _causal_loss(self.lm_head, found.last_hidden_state, kwargs["labels"], rest)
            return result_class(
                loss=loss, logits=None, past_key_values=found.past_key_values, hidden_states=found.hidden_states,
                attentions=found.attentions,
            )  # fmt: skip

        return _as_declared(forward, original)

    return make


def _as_declared(forward: Forward, original: Forward) -> Forward:
    """`forward` with the signature of `original`: transformers' Trainer drops columns that it does not find there."""
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def _causal_loss(head: Any, hidden: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """As transformers' ForCausalLMLoss: every position predicts the next label, mean or sum / num_items_in_batch."""
    ignore_index = options.get("ignore_index", -100)
    target = options.get("shift_labels")
    if target is None:
        target = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    count = options.get("num_items_in_batch")
    target = target.to(hidden.device).reshape(hidden.shape[:-1])
    reduction = "mean" if count is None else "sum"
    loss: Tensor = head(hidden, target=target, ignore_index=ignore_index, reduction=reduction)
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def masked_lm(_model: Any, original: Forward) -> Forward:
    """For BERT's masked language model: the loss of `cls.predictions.decoder(transform(hidden))`."""
    result_class = sys.modules[original.__module__].MaskedLMOutput

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _as_before(self, args, kwargs):
            return original(self, *args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "labels"}
        found = self.bert(*args, **{**rest, "return_dict": True})
        head = self.cls.predictions
        hidden = head.transform(found[0])
        labels = kwargs["labels"].to(hidden.device).reshape(hidden.shape[:-1])
        return result_class(
            loss=head.decoder(hidden, target=labels, ignore_index=-100, reduction="mean"), logits=None,
            hidden_states=found.hidden_states, attentions=found.attentions,
        )  # fmt: skip

    return _as_declared(forward, original)
