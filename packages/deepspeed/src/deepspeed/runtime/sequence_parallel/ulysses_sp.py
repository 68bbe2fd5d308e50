"""Upstream's path of Ulysses for Hugging Face's models, and of computation in tiles; see `deepspeed.sequence`."""

from deepspeed._lazy import explain_absent
from deepspeed.sequence.hf import UlyssesSPAttentionHF
from deepspeed.sequence.loader import UlyssesSPDataLoaderAdapter
from deepspeed.sequence.tiled import SequenceTiledCompute, TiledFusedLogitsLoss, TiledMLP, sequence_tiled_compute

__all__ = [
    "SequenceTiledCompute",
    "TiledFusedLogitsLoss",
    "TiledMLP",
    "UlyssesSPAttentionHF",
    "UlyssesSPDataLoaderAdapter",
    "sequence_tiled_compute",
]

explain_absent(__name__)
