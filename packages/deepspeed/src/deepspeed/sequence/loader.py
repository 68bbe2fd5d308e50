"""Batches of whole sequences, dealt in parts to the ranks that share them.

Each rank of a group reads batches of its own. The adapter takes one from every rank, and gives out, one after the
other, this rank's part of each: as many batches come out as the ranks of the group read together, and no rank ever
holds more than its own batch and its parts of the others'.

Source: Bekman et al., Arctic Long Sequence Training (2025), arXiv:2506.13996, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import ds_comm
from deepspeed.sequence.exchange import balanced, spans, swap
from deepspeed.utils.logging import logger

__all__ = ["UlyssesSPDataLoaderAdapter"]

IGNORED = -100
"""The label that counts for no loss."""

_Meta = list[tuple[str, Any]]


class UlyssesSPDataLoaderAdapter:
    """Iterates over parts of the batches of `dl`; collective over `sp_group`.

    A batch is a dict of tensors [batch, tokens, ...] with `input_ids` and `labels`; `position_ids` are counted where it
    has none. In what comes out, `shift_labels` stands for `labels`: each token's label is the next token's, also across
    ranks, and the last one's is -100. Tensors without a dimension of tokens, and what is no tensor, come whole.

    Args:
        dl: any sized iterable of such batches, another part of the data on each rank.
        sp_rank, sp_group, sp_world_size: this rank's place in the group that shares sequences.
        device: where the parts are put.
    Raises:
        ValueError: a batch without the entries above, or with fewer tokens than ranks.
    """

    def __init__(self, dl: Any, sp_rank: int, sp_group: Any, sp_world_size: int, device: Any) -> None:
        self.dl = dl
        self.sp_rank, self.sp_group, self.sp_world_size = sp_rank, sp_group, sp_world_size
        self.device = torch.device(device)
        self.iter: Iterator[Any] = iter(())
        self.micro_batches: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.dl) * self.sp_world_size

    def __getattr__(self, name: str) -> Any:
        """What the adapter lacks is the loader's (`batch_size`, `dataset`, `set_epoch`, ...)."""
        if name == "dl":
            raise AttributeError(name)
        return getattr(self.dl, name)

    def __iter__(self) -> UlyssesSPDataLoaderAdapter:
        self.iter = iter(self.dl)
        self.micro_batches = []
        return self

    def __next__(self) -> dict[str, Any]:
        if not self.micro_batches:
            self.refill()
        return self.micro_batches.pop(0)

    def refill(self) -> None:
        """Take a batch from each rank; StopIteration as soon as one of them has no more."""
        batch = next(self.iter, None)
        problem = None
        if batch is not None:
            try:
                batch = self._prepared(batch)
            except ValueError as error:
                problem, batch = str(error), None
        told: list[Any] = [None] * self.sp_world_size
        mine = (problem, None if batch is None else self._described(batch))
        ds_comm.all_gather_object(told, mine, group=self.sp_group, label="ulysses batches")
        for rank, (wrong, _) in enumerate(told):
            if wrong is not None:
                raise ValueError(f"the batch of rank {rank} of those that share sequences: {wrong}")
        if batch is None or any(meta is None for _, meta in told):
            left = sum(meta is not None for _, meta in told)
            if left:
                logger.warning("%d of %d ranks had one batch more than the others; it is left out", left, len(told))
            self.iter = iter(())
            raise StopIteration
        self.micro_batches = self._exchanged(batch, [meta for _, meta in told])

    def _prepared(self, given: Any) -> dict[str, Any]:
        """The rank's own batch, with position ids and shifted labels, on the device."""
        missing = [name for name in ("input_ids", "labels") if name not in given]
        if missing == ["labels"] and "shift_labels" in given:
            missing = []
        if missing:
            raise ValueError(f"no {' and no '.join(missing)}; it has {', '.join(map(str, given))}")
        batch: dict[str, Any] = {
            key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in given.items()
        }
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if ids.dim() < 2 or ids.shape[1] < self.sp_world_size:
            raise ValueError(
                f"input_ids of shape {tuple(ids.shape)}; expected [batch, tokens] with at least {self.sp_world_size}"
                " tokens, one for each rank"
            )
        if mask is not None and mask.shape != ids.shape[:2]:
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)}; expected {tuple(ids.shape[:2])}")
        if batch.get("position_ids") is None:
            counted = torch.ones_like(ids) if mask is None else mask.long()
            batch["position_ids"] = (counted.cumsum(-1) - 1).clamp(min=0)
        labels = batch.pop("labels", None)
        if "shift_labels" not in batch:
            batch["shift_labels"] = pad(labels[:, 1:], (0, 1), value=IGNORED)
        return batch

    def _described(self, batch: dict[str, Any]) -> _Meta:
        """What the other ranks must know: (shape, dtype, dimension of tokens) of tensors, other values themselves."""
        tokens = batch["input_ids"].shape[1]
        return [
            (
                key,
                (tuple(value.shape), value.dtype, _dim_of_tokens(value, tokens))
                if isinstance(value, Tensor)
                else [value],
            )
            for key, value in batch.items()
        ]

    def _exchanged(self, batch: dict[str, Any], metas: list[_Meta]) -> list[dict[str, Any]]:
        """This rank's part of every rank's batch, in the order of ranks; tensors travel by dtype."""
        out: list[dict[str, Any]] = [{} for _ in metas]
        for meta, found in zip(metas, out, strict=True):
            found.update((key, about[0] if isinstance(about, list) else None) for key, about in meta)
        dtypes = sorted({about[1] for meta in metas for _, about in meta if isinstance(about, tuple)}, key=str)
        for dtype in dtypes:
            chosen = [
                [(key, about) for key, about in meta if isinstance(about, tuple) and about[1] == dtype]
                for meta in metas
            ]
            parts = [
                [_part(batch[key], about[2], rank, self.sp_world_size) for key, about in chosen[self.sp_rank]]
                for rank in range(self.sp_world_size)
            ]
            shapes = [
                [_part_shape(about[0], about[2], self.sp_rank, self.sp_world_size) for _, about in rank]
                for rank in chosen
            ]
            if not parts[0]:
                parts = [[torch.empty(0, dtype=dtype, device=self.device)] for _ in parts]
            for found, names, tensors in zip(
                out, chosen, swap(self.sp_group, parts, shapes, "ulysses batches"), strict=True
            ):
                found.update((key, tensor) for (key, _), tensor in zip(names, tensors, strict=True))
        return out


def _dim_of_tokens(value: Tensor, tokens: int) -> int | None:
    """1 for [batch, tokens, ...], the last for [3, batch, tokens] (positions in images); None: no tokens."""
    if value.dim() >= 2 and value.shape[1] == tokens:
        return 1
    return value.dim() - 1 if value.dim() == 3 and value.shape[-1] == tokens else None


def _part(value: Tensor, dim: int | None, rank: int, ranks: int) -> Tensor:
    if dim is None:
        return value
    start, stop = spans(balanced(value.shape[dim], ranks))[rank]
    return value.narrow(dim, start, stop - start)


def _part_shape(shape: tuple[int, ...], dim: int | None, rank: int, ranks: int) -> tuple[int, ...]:
    if dim is None:
        return shape
    return (*shape[:dim], balanced(shape[dim], ranks)[rank], *shape[dim + 1 :])
