"""A Hugging Face causal language model as a decoder over a paged key/value cache: read once, computed by ds-kernels.

`read_decoder` turns a model into data (`DecodeModel`) without a second copy of its weights; `Decoder.forward`
computes the tokens of a `Batch` against a `KVCache`. Which families are known, and how they differ, is a table
(`families`). Nothing here knows requests, schedules or sampling.
"""

from __future__ import annotations

from ds_inference.decoder.adapters import adapters_of
from ds_inference.decoder.batch import Batch
from ds_inference.decoder.borrow import Borrowing
from ds_inference.decoder.cache import KVCache
from ds_inference.decoder.decoder import Decoder
from ds_inference.decoder.families import FAMILIES, Family
from ds_inference.decoder.reader import read_decoder

__all__ = ["FAMILIES", "Batch", "Borrowing", "Decoder", "Family", "KVCache", "adapters_of", "read_decoder"]
