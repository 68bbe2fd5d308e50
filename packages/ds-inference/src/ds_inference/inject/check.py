"""The self-check of an injection: a model's outputs for a short prompt, before and after.

`Probe` computes them before; `check` again after, through the module itself and through the decoder (a prompt of all
tokens but one, then one more as in generation), and refuses what differs by more than the rounding of the weights'
dtype explains. An error in the structure of a model is larger than that by far.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_inference.decoder import Batch, Decoder, KVCache
from ds_inference.errors import ModelError
from ds_inference.quantization import QuantizationSpec

__all__ = ["Probe"]

LENGTH = 12
"""Tokens of the prompt."""
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference, as a part of the largest output."""
QUANTISED = {8: 0.2, 4: 0.8}
"""The same for quantised weights, by the root mean square."""


class Probe:
    """A model's outputs for a fixed prompt."""

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        if not parameters or any(parameter.is_meta for parameter in parameters):
            raise ModelError(f"{type(model).__name__} has weights on the meta device; load its checkpoint first")
        self._dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
        embedding = cast(Any, model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        rows = int(getattr(embedding, "num_embeddings", 0))
        if not rows:
            raise ModelError(f"{type(model).__name__} has no embedding of tokens; kernel injection is for text models")
        device = parameters[0].device
        # Spread over the vocabulary, the same every time, without touching anybody's random numbers.
        self._tokens = (torch.arange(1, LENGTH + 1, device=device) * 7919 % rows).unsqueeze(0)
        self._before = self._outputs(model)

    def _outputs(self, model: nn.Module) -> Tensor:
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with torch.no_grad():
                result: Any = model(input_ids=self._tokens, **_without_cache(model))
        finally:
            for module in training:
                module.training = True
        found = result.get("logits") if hasattr(result, "get") else getattr(result, "logits", None)
        outputs: Tensor = result[0] if found is None else found
        return outputs.float()

    def check(self, model: nn.Module, decoder: Decoder | None, quantization: QuantizationSpec | None) -> None:
        """ModelError when outputs are not those of before."""
        self._compare("the model's modules", self._outputs(model), quantization)
        if decoder is not None:
            self._compare("the decoder", self._decoded(decoder), quantization)

    def _decoded(self, decoder: Decoder) -> Tensor:
        tokens = self._tokens[0]
        cache = KVCache(decoder, 1, LENGTH)
        table = torch.zeros(1, 1, dtype=torch.int32, device=tokens.device)
        places = torch.arange(LENGTH, device=tokens.device)

        def run(first: int, last: int) -> Tensor:
            new = places[first:last]
            context = torch.tensor([last], dtype=torch.int32, device=tokens.device)
            offsets = torch.tensor([0, last - first], dtype=torch.int32, device=tokens.device)
            seqlens = None if last - first == 1 else offsets
            return decoder.forward(
                Batch(tokens[first:last], new, new, table, context, seqlens, max_seqlen=last - first), cache
            )

        return torch.cat([run(0, LENGTH - 1).clone(), run(LENGTH - 1, LENGTH)]).unsqueeze(0)

    def _compare(self, what: str, after: Tensor, quantization: QuantizationSpec | None) -> None:
        before = self._before
        if after.shape != before.shape:
            raise ModelError(f"with injected kernels {what} gives {tuple(after.shape)}, before {tuple(before.shape)}")
        difference = (after - before).double()
        if quantization is None:
            error, limit = difference.abs().max() / before.abs().max(), LIMITS.get(self._dtype, 0.1)
        else:
            formats = [one for one in (quantization.default, *(form for _, form in quantization.rules)) if one]
            limit = QUANTISED[min((one.bits for one in formats), default=8)]
            error = difference.square().mean().sqrt() / before.double().square().mean().sqrt()
        if not float(error) <= limit:
            raise ModelError(
                f"with injected kernels {what} gives outputs that differ by {float(error):.2g} of their size; at most "
                f"{limit:.2g} was expected. The model is not what its model type says; leave "
                "replace_with_kernel_inject out for it"
            )


def _without_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) is not None else {}
