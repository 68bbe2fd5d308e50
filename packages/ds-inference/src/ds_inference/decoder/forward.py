"""The pass over a decoder's layers: ds-kernels' `Composition`, and what a tensor-parallel rank adds to it.

Each rank computes its part of the heads, of the MLP and of the vocabulary; between them partial sums are added up, and
logits gathered.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ds_inference.decoder.parallel import Parallel
from ds_kernels import Projection
from ds_kernels.ops.decode import Composition

__all__ = ["Forward"]


@dataclasses.dataclass(frozen=True)
class Forward(Composition):
    """The pass over one model; called with a `Batch` and the caches. `parallel`: on a tensor-parallel rank."""

    parallel: Parallel | None = None

    def tokens_embedded(self, tokens: Tensor) -> Tensor:
        """[T, hidden], replicated."""
        if self.parallel is None:
            return super().tokens_embedded(tokens)
        table = self.model.embedding
        assert isinstance(table, Tensor)
        return self.parallel.embed(tokens, table)

    def project(self, projection: Projection, x: Tensor) -> Tensor:
        """The product; where each rank has a part of the sum, the sum."""
        if self.parallel is None or id(projection) not in self.parallel.summed:
            return super().project(projection, x)
        part = super().project(dataclasses.replace(projection, bias=None), x)
        total = self.parallel.sum(part, "projection")
        return total if projection.bias is None else total + projection.bias

    def head(self, x: Tensor) -> Tensor:
        """fp32 logits of normed rows, replicated."""
        if self.parallel is None:
            return super().head(x)
        return self.parallel.logits(self.project(self.model.head, x)).float()
