"""BERT: the masked loss, of the masked rows alone. Its norms and activations are torch's fused operations already."""

from __future__ import annotations

from ds_kernels.patch.losses import masked_lm, masked_unfit
from ds_kernels.patch.rules import Family, Rule

__all__ = ["FAMILY"]

FAMILY = Family("bert", (Rule("loss", "BertForMaskedLM", masked_lm, masked_unfit),))
