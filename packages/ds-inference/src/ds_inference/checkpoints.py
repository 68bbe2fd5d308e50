"""Weights into a model, and a prepared model's weights onto disk.

`load_into` fills a model, with memory or on the meta device, tensor by tensor from any form of checkpoint
(`sources`): there is never a second copy, only the tensor that is being read. Under tensor parallelism each rank reads
its own ranges. `save_shards` writes what the ranks hold as safetensors files with a description that loads again, at
any number of ranks.

Invariants: after `load_into` nothing is on the meta device; every tensor of the model came from the checkpoint, is tied
to one that did, or is a buffer that the module makes by itself. What is missing, has another shape, or was left over is
named in an error; only left-over names of known kinds (buffers of older versions) are passed over.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_inference.errors import CheckpointError, ModelError
from ds_inference.loader import open_checkpoint
from ds_inference.sources import TensorSource, open_source
from ds_inference.tp.applied import AppliedPlan

__all__ = ["DESCRIPTION", "load_into", "save_shards"]

DESCRIPTION = "ds_inference_config.json"
_OLD_NAMES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
_LEFT_OVER = re.compile(
    r"(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias|num_batches_tracked|_extra_state)$|^(pooler|lm_head|cls)\."
)
"""What checkpoints have and models need not: buffers that are made, heads that are not used."""
_SHOWN = 5


def load_into(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    base_dir: str = "",
    applied: AppliedPlan | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill `model` from a checkpoint, in place.

    Args:
        checkpoint: a folder, a file, a description (path of a JSON file, or a dict); see `sources`.
        base_dir: what paths are relative to.
        applied: the model is split like this; the checkpoint is whole.
        dtype, device: of tensors that are on the meta device now; default: the checkpoint's, and the CPU. Others keep
            theirs.

    Raises:
        CheckpointError: something is missing, broken, or of another model; names it.
        ModelError: a buffer on the meta device that nothing tells the values of.
    """
    source = open_source(checkpoint, base_dir)
    names = _names_in(model, source)
    _check_names(model, source, names, checkpoint)
    done: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in done or name not in names:
            continue
        whole = _whole_shape(value, name, applied)
        wanted = dtype if value.is_floating_point() else None
        target = device if value.is_meta else value.device
        kept = wanted if value.is_meta else value.dtype
        part = None if applied is None else applied.part(name)
        read = source.read(names[name], whole or value.shape, part, dtype=kept, device=target)
        if read.shape != value.shape:
            raise CheckpointError(
                f"{names[name]} is {tuple(read.shape)} in the checkpoint, and {name} is {tuple(value.shape)} in the "
                "model; it is a checkpoint of another model"
            )
        done[id(value)] = _placed(value, read)
    _replace(model, done)
    _tie(model)
    _make_buffers(model, device)
    if left := [name for name, tensor in _tensors(model) if tensor.is_meta]:
        raise CheckpointError(f"the checkpoint has nothing for {_some(left)}, and nothing is tied to give it")


@torch.no_grad()
def _placed(value: Tensor, read: Tensor) -> Tensor:
    if not value.is_meta:
        value.copy_(read)
        return value
    return nn.Parameter(read, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else read


def _whole_shape(value: Tensor, name: str, applied: AppliedPlan | None) -> list[int] | None:
    """Of the unsplit tensor."""
    part = None if applied is None else applied.part(name)
    if applied is None or part is None:
        return None
    dim = part[0]
    shape = list(value.shape)
    ranges = [one for rank in range(applied.size) for one in cast(Any, applied.part(name, rank))[1]]
    shape[dim] = max(high for _, high in ranges)
    return shape


def _names_in(model: nn.Module, source: TensorSource) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, where base models and models with heads, old and new, differ."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    found = {}
    for name in model.state_dict():
        candidates = [name, f"{prefix}.{name}", name.removeprefix(prefix + "."), f"module.{name}"]
        candidates += [one.replace(new, old) for new, old in _OLD_NAMES for one in candidates[:3] if new in one]
        stored = next((one for one in candidates if one in source), None)
        if stored is not None:
            found[name] = stored
    return found


def _check_names(model: nn.Module, source: TensorSource, names: Mapping[str, str], what: Any) -> None:
    state = model.state_dict(keep_vars=True)
    given = {id(state[name]) for name in names} | {id(state[name]) for name in _tied_names(model, state)}
    shown = what if isinstance(what, (str, Path)) else "the described checkpoint"
    if missing := [name for name, value in state.items() if id(value) not in given]:
        raise CheckpointError(f"{shown} lacks {_some(missing)} of {type(model).__name__}; it is not one of this model")
    left = [name for name in source.names if name not in set(names.values()) and not _LEFT_OVER.search(name)]
    if left:
        raise CheckpointError(f"{shown} has {_some(left)}, for which {type(model).__name__} has no place")


def _tied_names(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names that transformers ties after loading, such as the head's."""
    tied = getattr(model, "_tied_weights_keys", None) or ()
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return []
    return [name for name in state if any(name == key or re.search(key, name) for key in tied)]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _replace(model: nn.Module, done: Mapping[int, Tensor]) -> None:
    """Put tensors with memory in the place of those on the meta device."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and value.is_meta and id(value) in done:
                    store[name] = done[id(value)]  # type: ignore[assignment]


def _tie(model: nn.Module) -> None:
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()


def _make_buffers(model: nn.Module, device: torch.device | None) -> None:
    """Buffers that no checkpoint has: rotary frequencies, positions; from the module's own constructor, or by name."""
    for path, module in model.named_modules():
        lost = [name for name, value in module._buffers.items() if value is not None and value.is_meta]
        if not lost:
            continue
        fresh = _built_again(module) if not any(True for _ in module.parameters()) else None
        for name in lost:
            old = cast(Tensor, module._buffers[name])
            made = fresh._buffers.get(name) if fresh is not None else None
            if made is None and name == "position_ids":
                made = torch.arange(old.shape[-1]).expand(old.shape)
            elif made is None and name == "token_type_ids":
                made = torch.zeros(old.shape, dtype=old.dtype)
            if made is None:
                raise ModelError(
                    f"{path}.{name} is a buffer on the meta device that no checkpoint has; build the model with its "
                    "buffers in memory (accelerate's init_empty_weights does)"
                )
            module._buffers[name] = made.clone().to(device or "cpu")


def _built_again(module: nn.Module) -> nn.Module | None:
    """A module without parameters, from its configuration, in memory."""
    config = getattr(module, "config", None)
    if config is None or "config" not in inspect.signature(type(module)).parameters:
        return None
    with torch.device("cpu"):
        return type(module)(config=config)


def save_shards(model: nn.Module, folder: str | Path, applied: AppliedPlan | None = None) -> Path:
    """Write a model's weights: what all ranks have in one file, and one file per tensor-parallel rank; collective.

    Returns the path of the description, which `checkpoint` of `init_inference` takes, at any number of ranks.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    rank, size = (0, 1) if applied is None else (applied.rank, applied.size)
    whole: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    parts: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        part = None if applied is None else applied.part(name)
        (whole if part is None else own)[name] = value.detach().contiguous()
        if applied is not None and part is not None:
            parts[name] = [part[0], [list(cast(Any, applied.part(name, one))[1]) for one in range(size)]]
    shards = [f"tp_rank_{one:02d}.safetensors" for one in range(size)] if parts else []
    if own:
        save_file(_unshared(own), where / shards[rank])
    description = {
        "type": "ds_model",
        "version": 1.0,
        "checkpoints": {"non_tp": ["non_tp.safetensors"], "tp": shards},
        "parallelization": "tp",
        "tp_size": size,
        "parts": parts,
    }
    if rank == 0:
        save_file(_unshared(whole), where / "non_tp.safetensors")
        (where / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    if applied is not None:
        applied.communicator.barrier(label="save_mp_checkpoint_path")
    with open_checkpoint(where / "non_tp.safetensors"):  # what was written can be read
        return where / DESCRIPTION


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of one storage each with memory of their own, as safetensors wants them."""
    return {
        name: value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
        for name, value in tensors.items()
    }


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
