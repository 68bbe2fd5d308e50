"""Sequence parallelism: ranks that share each sequence, and computation in tiles of it.

`layer` has the attention of any model (Ulysses), `hf` that of Hugging Face's models, `loader` what splits
batches, `cross_entropy` the loss, `tiled` computation that never holds a whole activation, `ranks` who shares what.
"""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, {}, ("cross_entropy", "exchange", "hf", "layer", "loader", "ranks", "tiled"))
