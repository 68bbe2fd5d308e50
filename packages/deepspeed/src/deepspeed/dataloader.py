"""Data for the engine: sharded over the data-parallel ranks, resumable to the sample.

Owns `DeepSpeedDataLoader`, its sampler `ShardedSampler`, and `RepeatingLoader`.

Vocabulary: the *cursor* is (epoch, samples consumed in this epoch by all ranks together). It counts what the training
loop has received, not what worker processes have prefetched.

Invariants:
- The order of an epoch is a function of (seed, epoch) alone: `torch.randperm` under a generator seeded with
  seed + epoch, as in torch's DistributedSampler, with which a fresh epoch agrees index for index.
- Ranks take turns: rank r gets entries r, r+N, r+2N, ... of what is left, so after k samples on each rank exactly the
  first k*N entries are consumed. That is why a cursor saved on N ranks resumes on any other number of them without
  repeating or losing a sample.
- All ranks get the same number of batches. If N does not divide the rest, the first entries are repeated at the end
  (or, with `drop_last`, the tail is left out and nobody sees a sample twice).
- Iterating takes nothing from the global random numbers: dropout masks do not depend on where an epoch was resumed.
- An IterableDataset shards itself, as everywhere in torch; the loader only counts its batches and, on resume, draws
  and discards those already consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import ds_comm
import ds_comm.device
from deepspeed.utils.logging import log_dist, logger


class _Startable(Protocol):
    def start(self) -> None: ...


class ShardedSampler(Sampler[int]):
    """Indices of one data-parallel rank, from any point of an epoch on.

    Args:
        num_samples: length of the dataset.
        rank, num_shards: whose indices.
        shuffle: a new permutation per epoch; False keeps the dataset's order.
        drop_last: leave out the tail that does not give every rank a sample.
    """

    def __init__(
        self,
        num_samples: int,
        rank: int,
        num_shards: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if not 0 <= rank < num_shards:
            raise ValueError(f"rank is {rank}; expected 0 <= rank < number of data-parallel ranks ({num_shards})")
        self.num_samples, self.rank, self.num_shards = num_samples, rank, num_shards
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch = 0
        self.consumed = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        left = max(0, self.num_samples - self.consumed)
        return left // self.num_shards if self.drop_last else -(-left // self.num_shards)

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        left = order[self.consumed :]
        total = len(self) * self.num_shards
        if total > len(left):
            # Repeat from the start of the epoch's order, as often as a tiny dataset needs.
            missing = total - len(left)
            left = left + (order * (-(-missing // len(order))))[:missing]
        return iter(left[self.rank : total : self.num_shards])

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_samples))
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        return cast("list[int]", torch.randperm(self.num_samples, generator=generator).tolist())


class _Tail(Sampler[Any]):
    """A foreign sampler without the entries this rank has already consumed."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self.sampler, self.skip = sampler, skip

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.sampler), self.skip, None)

    def __len__(self) -> int:
        return max(0, len(cast(Sized, self.sampler)) - self.skip)


class DeepSpeedDataLoader:
    """The loader that `deepspeed.initialize(training_data=...)` and `engine.deepspeed_io` return.

    Every `iter()` is one epoch; a completed epoch advances to the next permutation by itself, an abandoned one begins
    anew. After `load_state_dict` the next `iter()` continues inside the epoch where the state was taken.

    Args:
        dataset: map-style (sharded here) or IterableDataset (shards itself).
        batch_size: samples per batch of one rank.
        pin_memory: page-locked batches; ignored on a CPU.
        local_rank: kept for its place in the signature; sharding follows the data-parallel rank.
        tput_timer: started before each batch is fetched, so throughput includes waiting for data.
        num_local_io_workers: worker processes; None loads in this process.
        data_sampler: replaces the sharded sampler; it must already yield this rank's share only.
        data_parallel_world_size, data_parallel_rank: default to the world.
        deepspeed_dataloader_config: further arguments of torch's DataLoader, and `seed` / `shuffle` of the sampler.

    Attributes:
        post_process_func: when set, what is handed out is `post_process_func(batch, state of the sampler)`.

    Raises:
        ValueError: for an impossible rank or batch size.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        pin_memory: bool = False,
        local_rank: int = -1,
        tput_timer: _Startable | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
        data_sampler: Any = None,
        data_parallel_world_size: int | None = None,
        data_parallel_rank: int | None = None,
        dataloader_drop_last: bool = False,
        deepspeed_dataloader_config: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1 sample per batch and rank")
        options = dict(deepspeed_dataloader_config or {})
        seed, shuffle = options.pop("seed", 0), options.pop("shuffle", True)
        self._seed: int = seed
        alone = not ds_comm.is_initialized()
        world = 1 if alone else ds_comm.get_world_size()
        self.num_shards = data_parallel_world_size or world
        self.rank = data_parallel_rank if data_parallel_rank is not None else (0 if alone else ds_comm.get_rank())
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, dataloader_drop_last
        self.tput_timer, self.local_rank = tput_timer, local_rank
        self.is_iterable = isinstance(dataset, IterableDataset)
        self.post_process_func: Callable[[Any, dict[str, Any]], Any] | None = None
        self.data_sampler = data_sampler
        if data_sampler is None and not self.is_iterable:
            self.data_sampler = ShardedSampler(
                len(cast(Sized, dataset)),
                self.rank,
                self.num_shards,
                shuffle=shuffle,
                seed=seed,
                drop_last=dataloader_drop_last,
            )
        elif self.is_iterable and self.num_shards > 1:
            log_dist(
                f"{type(dataset).__name__} is iterable: it must give each of the {self.num_shards} ranks its own share "
                "by itself, the loader does not split it",
                ranks=[0],
            )
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "collate_fn": collate_fn,
            "num_workers": num_local_io_workers or 0,
            "pin_memory": pin_memory and ds_comm.device.device_type() != "cpu",
            "drop_last": dataloader_drop_last,
            **options,
        }
        self._epoch = 0
        self._consumed = 0
        self._finished = False
        self._resume = False
        self._batches: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next or current batch."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next `iter()` and begin it from the start."""
        self._epoch, self._consumed, self._finished, self._resume = epoch, 0, False, False

    def __len__(self) -> int:
        """Batches of one rank in a whole epoch (TypeError for a dataset without a length)."""
        if self.is_iterable:
            samples = len(cast(Sized, self.dataset))
        elif isinstance(self.data_sampler, ShardedSampler):
            whole = self.data_sampler
            samples = (
                whole.num_samples // whole.num_shards if whole.drop_last else -(-whole.num_samples // whole.num_shards)
            )
        else:
            samples = len(self.data_sampler)
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> DeepSpeedDataLoader:
        if self._finished:
            self._epoch, self._consumed, self._finished = self._epoch + 1, 0, False
        elif not self._resume:
            self._consumed = 0
        self._resume = False
        self._batches = self._run()
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            iter(self)
        if self.tput_timer is not None:
            self.tput_timer.start()
        batch = next(cast("Iterator[Any]", self._batches))
        if self.post_process_func is None:
            return batch
        sampler_state = getattr(self.data_sampler, "state_dict", self.state_dict)
        return self.post_process_func(batch, sampler_state())

    def state_dict(self) -> dict[str, Any]:
        """The cursor; everything the training loop has received so far counts as consumed."""
        epoch, consumed = (self._epoch + 1, 0) if self._at_end() else (self._epoch, self._consumed)
        state: dict[str, Any] = {"epoch": epoch, "consumed": consumed}
        if isinstance(self.data_sampler, ShardedSampler):
            state |= {
                "seed": self.data_sampler.seed,
                "shuffle": self.data_sampler.shuffle,
                "num_samples": self.data_sampler.num_samples,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved cursor with the next `iter()`; ValueError when the data is not the same."""
        sampler = self.data_sampler
        if isinstance(sampler, ShardedSampler):
            if state.get("num_samples", sampler.num_samples) != sampler.num_samples:
                raise ValueError(
                    f"the saved data cursor belongs to a dataset of {state['num_samples']} samples, this one has "
                    f"{sampler.num_samples}; resume with the same data, or leave the cursor out to start an epoch anew"
                )
            sampler.seed = state.get("seed", sampler.seed)
            sampler.shuffle = state.get("shuffle", sampler.shuffle)
        self._epoch, self._consumed = int(state["epoch"]), int(state["consumed"])
        self._finished, self._resume, self._batches = False, True, None

    def _at_end(self) -> bool:
        """Whether the last batch of the epoch was handed out, even if nobody has asked for one more."""
        if self._finished:
            return True
        if not isinstance(self.data_sampler, ShardedSampler):
            return False
        left = self.data_sampler.num_samples - self._consumed
        return left < (self.batch_size * self.num_shards if self.drop_last else 1)

    def _run(self) -> Iterator[Any]:
        """Batches from the cursor to the end of the epoch."""
        per_batch = self.batch_size * self.num_shards
        discard = 0
        sampler = self.data_sampler
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self._epoch)
        if isinstance(sampler, ShardedSampler):
            sampler.consumed = self._consumed
        elif self._consumed:
            discard, uneven = divmod(self._consumed, per_batch)
            if uneven:
                logger.warning(
                    f"data cursor: {self._consumed} consumed samples are not whole batches of {per_batch} (it was "
                    f"saved with another batch size or number of ranks); this epoch repeats up to {uneven} samples"
                )
            if sampler is not None:
                sampler, discard = _Tail(sampler, discard * self.batch_size), 0
        # torch's loader draws its workers' seeds: from a generator of its own, since a resumed run that took them from
        # the global one would be a draw ahead of the run it continues
        generator = torch.Generator()
        generator.manual_seed(self._seed + self._epoch * self.num_shards + self.rank)
        options = {"generator": generator, **self._options}
        loader: DataLoader[Any] = DataLoader(self.dataset, sampler=sampler, **options)
        for batch in islice(loader, discard, None):
            self._consumed += per_batch
            yield batch
        self._finished = True


class RepeatingLoader:
    """An endless iterator over a loader: at its end a new pass begins.

    A `sampler` of the loader that has `set_epoch` is told the number of the pass, so that a shuffling torch
    DistributedSampler does not repeat one order forever; a `DeepSpeedDataLoader` advances by itself. RuntimeError for
    a loader that yields nothing, instead of looping forever.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.epoch = 0
        self._iterator = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self.epoch += 1
        sampler = getattr(self.loader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise RuntimeError(
                f"{type(self.loader).__name__} yields no batch, so it cannot be repeated; check that the dataset is "
                "not empty and that drop_last leaves at least one batch"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        """Cursor of the loader; TypeError when it has none."""
        return {"epoch": self.epoch, "loader": self._stateful().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved cursor."""
        self.epoch = int(state["epoch"])
        self._stateful().load_state_dict(state["loader"])
        self._iterator = iter(self.loader)

    def _stateful(self) -> Any:
        if not (hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")):
            raise TypeError(
                f"{type(self.loader).__name__} has no state_dict/load_state_dict, so its position cannot be saved; "
                "repeat a DeepSpeedDataLoader instead"
            )
        return self.loader
