"""What a serving engine is built with, and building it: model, tokenizer, cache, limits.

A model is a transformers model in memory, a `Decoder`, or a path: a transformers folder, or a GGUF file, which
transformers reads (an optional dependency: only needed for paths). The cache takes the memory it is told to, or what
`max_running` requests of full length need, at most a quarter of the memory that is free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_inference.decoder import Decoder, KVCache, read_decoder
from ds_inference.errors import CheckpointError, ConfigError
from ds_inference.quantization import QuantizationSpec
from ds_inference.serve.blocks import BlockManager
from ds_inference.serve.core import ServingCore
from ds_inference.serve.scheduler import SchedulerLimits
from ds_inference.serve.text import HuggingFaceCodec, TextCodec

__all__ = ["Model", "ServingOptions", "build_core", "read_model"]

Model = str | PathLike[str] | nn.Module | Decoder
"""Where serving takes its model from."""

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class ServingOptions:
    """How a model is served. ConfigError names a value that cannot be."""

    dtype: str | torch.dtype | None = None
    """Of a model that is read from a path; None: the checkpoint's own (bf16 for GGUF)."""
    device: str | torch.device | None = None
    """Where a model from a path goes; None: the accelerator if there is one, else the CPU."""
    quantization: str | Mapping[str, Any] | QuantizationSpec | None = None
    """Weights are quantised to "int8", "int4", or as `QuantizationSpec.parse` says."""
    max_length: int | None = None
    """Tokens of a prompt and its answer together; None: the model's positions."""
    max_running: int = 64
    """Requests computed side by side."""
    max_tokens_per_step: int = 512
    """Tokens computed in one pass: how long a prompt may hold up those that decode."""
    max_queued: int = 1024
    """Requests that may wait; more are refused."""
    max_queued_tokens: int = 1 << 22
    """Tokens of all requests that wait."""
    block_size: int = 16
    """Tokens per block of the cache."""
    num_blocks: int | None = None
    """Blocks of the cache; None: from `cache_nbytes`."""
    cache_nbytes: int | None = None
    """Memory for the cache; None: by `max_running` and `max_length`, at most a quarter of what is free."""
    prefix_caching: bool = True
    """Prompts that begin alike share what was computed."""

    def __post_init__(self) -> None:
        for name in ("max_length", "max_running", "max_tokens_per_step", "max_queued", "max_queued_tokens",
                     "block_size", "num_blocks", "cache_nbytes"):  # fmt: skip
            value = getattr(self, name)
            low = 2 if name == "max_length" else 1
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ConfigError(f"{name} is {value!r}; expected an int of at least {low}")
        if self.max_tokens_per_step < self.max_running:
            raise ConfigError(
                f"max_tokens_per_step is {self.max_tokens_per_step}; expected at least max_running, {self.max_running}"
            )
        if isinstance(self.dtype, str) and self.dtype not in _DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; expected one of {', '.join(_DTYPES)}, or a torch.dtype")

    @classmethod
    def of(cls, options: dict[str, Any]) -> ServingOptions:
        """The same from keywords; ConfigError names one that there is not."""
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(f"option {unknown[0]!r} is unknown; known are {', '.join(known)}")
        return cls(**options)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return _DTYPES[self.dtype] if isinstance(self.dtype, str) else self.dtype


def build_core(model: Model, options: ServingOptions, tokenizer: Any = None) -> ServingCore:
    """Read the model if need be, make its cache, and put a `ServingCore` on them.

    `tokenizer`: one of transformers, or a `TextCodec`; a path brings its own. ModelError for a model that there is no
    decoder for, ConfigError where the limits contradict each other, CheckpointError for a path that cannot be read.
    """
    if isinstance(model, (str, PathLike)):
        model, found = read_model(Path(model), options)
        tokenizer = found if tokenizer is None else tokenizer
    eos = _end_tokens(model)
    decoder = _decoder(model, options)
    codec: TextCodec | None = HuggingFaceCodec(tokenizer) if hasattr(tokenizer, "eos_token_id") else tokenizer
    length = _length(decoder, options)
    num_blocks = _of_all_ranks(decoder, _num_blocks(decoder, options, length))
    cache = KVCache(decoder, num_blocks, options.block_size)
    blocks = BlockManager(num_blocks, options.block_size, prefix_caching=options.prefix_caching)
    limits = SchedulerLimits(
        max_length=length,
        max_tokens_per_step=options.max_tokens_per_step,
        max_running=options.max_running,
        max_queued=options.max_queued,
        max_queued_tokens=options.max_queued_tokens,
    )
    return ServingCore(decoder, cache, blocks, limits, codec, eos)


def _decoder(model: nn.Module | Decoder, options: ServingOptions) -> Decoder:
    if not isinstance(model, Decoder):
        return read_decoder(model, QuantizationSpec.parse(options.quantization))
    if options.quantization is not None:
        raise ConfigError("a Decoder is quantised when it is read; give read_decoder the quantization, or a model here")
    return model


def _length(decoder: Decoder, options: ServingOptions) -> int:
    own = decoder.max_positions
    if options.max_length is None:
        if own is None:
            raise ConfigError("the model does not say how long it can be; give max_length")
        return own
    if own is not None and options.max_length > own:
        raise ConfigError(f"max_length is {options.max_length}; expected at most {own}, the model's positions")
    return options.max_length


def _num_blocks(decoder: Decoder, options: ServingOptions, length: int) -> int:
    if options.num_blocks is not None:
        return options.num_blocks
    block_nbytes = KVCache.bytes_per_token(decoder) * options.block_size
    wanted = options.max_running * -(-length // options.block_size)
    nbytes = _free_nbytes(decoder.device) // 4 if options.cache_nbytes is None else options.cache_nbytes
    if nbytes < block_nbytes:
        raise ConfigError(f"the cache may have {nbytes} bytes (cache_nbytes), one block needs {block_nbytes}")
    return min(wanted, nbytes // block_nbytes)


def _of_all_ranks(decoder: Decoder, num_blocks: int) -> int:
    """The fewest of any tensor-parallel rank: memory that is free differs, blocks are the same on all."""
    if decoder.communicator is None:
        return num_blocks
    fewest = torch.tensor([num_blocks], device=decoder.device)
    decoder.communicator.all_reduce(fewest, torch.distributed.ReduceOp.MIN, label="serving: blocks of the cache")
    return int(fewest)


def _free_nbytes(device: torch.device) -> int:
    if device.type != "cpu":
        return int(torch.accelerator.get_memory_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _end_tokens(model: nn.Module | Decoder) -> tuple[int, ...]:
    """As generate of transformers finds them: the generation config says, where there is one."""
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def read_model(path: Path, options: ServingOptions) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a transformers folder, or of a GGUF file; ConfigError, CheckpointError as `build_core`."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ConfigError(
            "reading a model from a path needs transformers; pip install transformers, or give a model"
        ) from error
    if not path.exists():
        raise CheckpointError(f"model {str(path)!r} is not there; expected a transformers folder, or a GGUF file")
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    how: dict[str, Any] = {"dtype": options.torch_dtype or "auto"}
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    if len(files) > 1:
        raise CheckpointError(f"model {str(path)!r} has {len(files)} GGUF files; name one of them")
    file = files[0] if files else path
    if file.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        how = {"dtype": options.torch_dtype or torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, **how)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model {str(path)!r} cannot be read: {error}") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return nn.Module.to(model, options.device or accelerator or "cpu").train(False), tokenizer
