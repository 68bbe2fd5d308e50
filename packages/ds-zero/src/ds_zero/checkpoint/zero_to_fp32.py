"""Upstream's `deepspeed.utils.zero_to_fp32` names, on our checkpoints: same arguments, same results, streamed."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ds_zero.checkpoint.consolidate import LazyTensor, export_safetensors, export_torch, full_state_dict
from ds_zero.checkpoint.manifest import MANIFEST_NAME, Manifest
from ds_zero.checkpoint.read import open_checkpoint
from ds_zero.errors import CheckpointError

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
    "main",
]

_ModuleT = TypeVar("_ModuleT", bound=torch.nn.Module)
_Path = str | os.PathLike[str]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: _Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, torch.Tensor | LazyTensor]:
    """The whole model in fp32, buffers included; `lazy_mode`: values are read by their `contiguous()`."""
    return full_state_dict(
        checkpoint_dir, tag, exclude_frozen=exclude_frozen_parameters, lazy=lazy_mode, buffers_to_dtype=True
    )


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: _Path,
    output_dir: _Path,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write pytorch_model.bin (or model.safetensors) to `output_dir`, with an index when it takes several files."""
    export = export_safetensors if safe_serialization else export_torch
    export(checkpoint_dir, output_dir, max_shard_size=max_shard_size, tag=tag, exclude_frozen=exclude_frozen_parameters)


def load_state_dict_from_zero_checkpoint(model: _ModuleT, checkpoint_dir: _Path, tag: str | None = None) -> _ModuleT:
    """Load the fp32 weights into a plain (not sharded) model, on the CPU, and return it.

    Raises:
        CheckpointError: names differ (names that were saved as frozen and left out may be missing).
    """
    model = model.cpu()
    result = model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    partial = open_checkpoint(checkpoint_dir, tag).manifest.exclude_frozen
    if result.unexpected_keys or (result.missing_keys and not partial):
        raise CheckpointError(
            f"{checkpoint_dir} is a checkpoint of another model: missing {result.missing_keys[:10]}, "
            f"unexpected {result.unexpected_keys[:10]}"
        )
    return model


def get_model_state_file(checkpoint_dir: _Path, zero_stage: int) -> str:
    """The file that describes the model of a tag directory: its manifest, at every stage."""
    path = Path(checkpoint_dir) / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {checkpoint_dir} is not a complete checkpoint")
    return str(path)


def get_optim_files(checkpoint_dir: _Path) -> list[str]:
    """The shard files of a tag directory, in rank order (they hold masters and optimizer state)."""
    manifest_path = Path(get_model_state_file(checkpoint_dir, 0))
    manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"), str(manifest_path))
    return [str(manifest_path.parent / file.name) for file in manifest.files]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `zero_to_fp32.py`."""
    parser = argparse.ArgumentParser(prog="zero_to_fp32", description="Make one fp32 model of a sharded checkpoint.")
    parser.add_argument("checkpoint_dir", help="the folder that holds `latest`")
    parser.add_argument("output_dir", help="where pytorch_model.bin or model.safetensors goes")
    parser.add_argument("--max_shard_size", default="5GB", help="of one output file (default 5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors instead of pickle")
    parser.add_argument("-t", "--tag", default=None, help="which checkpoint (default: what `latest` names)")
    parser.add_argument("--exclude_frozen_parameters", action="store_true")
    parser.add_argument("-d", "--debug", action="store_true", help="log more")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING)
    convert_zero_checkpoint_to_fp32_state_dict(
        args.checkpoint_dir,
        args.output_dir,
        max_shard_size=args.max_shard_size,
        safe_serialization=args.safe_serialization,
        tag=args.tag,
        exclude_frozen_parameters=args.exclude_frozen_parameters,
    )
    return 0
