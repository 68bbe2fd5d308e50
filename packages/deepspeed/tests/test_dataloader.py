"""Shards are disjoint and cover; order is torch's; a saved cursor resumes to the sample, on any number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from deepspeed.dataloader import DeepSpeedDataLoader, RepeatingLoader, ShardedSampler


class Numbers(IterableDataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


def loader(count: int, batch: int, rank: int = 0, world: int = 1, **kwargs: Any) -> DeepSpeedDataLoader:
    data = kwargs.pop("dataset", None) or list(range(count))
    return DeepSpeedDataLoader(
        data, batch, data_parallel_rank=rank, data_parallel_world_size=world, collate_fn=list, **kwargs
    )


def flat(batches: Any) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


@given(
    count=st.integers(1, 40),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
    drop=st.booleans(),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_fresh_epoch_is_torchs(count: int, world: int, epoch: int, drop: bool, shuffle: bool) -> None:
    for rank in range(world):
        ours = ShardedSampler(count, rank, world, shuffle=shuffle, drop_last=drop)
        ours.set_epoch(epoch)
        torchs = DistributedSampler(
            range(count), num_replicas=world, rank=rank, shuffle=shuffle, drop_last=drop and count % world != 0
        )
        if drop and count < world:  # torch's own sampler does not count right there
            assert list(ours) == []
            continue
        torchs.set_epoch(epoch)
        assert list(ours) == list(torchs)
        assert len(ours) == len(list(ours))


@given(count=st.integers(1, 60), world=st.integers(1, 5), batch=st.integers(1, 4), drop=st.booleans())
@settings(max_examples=60, deadline=None)
def test_shards_are_disjoint_and_cover(count: int, world: int, batch: int, drop: bool) -> None:
    shards = [flat(loader(count, batch, rank, world, dataloader_drop_last=drop)) for rank in range(world)]
    assert len({len(shard) for shard in shards}) == 1, "all ranks make the same number of steps"
    seen = sorted(flat(shards))
    if drop:
        assert len(seen) == len(set(seen)) and count - len(seen) < batch * world
    else:
        assert set(seen) == set(range(count))
        assert len(seen) - count < world


@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 3),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    steps=st.integers(0, 30),
    drop=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_cursor_resumes_on_any_number_of_ranks(
    count: int, batch: int, worlds: tuple[int, int], steps: int, drop: bool
) -> None:
    before, after = worlds
    ranks = [loader(count, batch, rank, before, dataloader_drop_last=drop) for rank in range(before)]
    seen: list[int] = []
    for each in ranks:
        seen += flat(itertools.islice(each, steps))
    states = [each.state_dict() for each in ranks]
    assert all(state == states[0] for state in states), "the cursor is the same on all ranks"
    if states[0]["epoch"] > 0:
        assert states[0]["consumed"] == 0
        return
    for rank in range(after):
        resumed = loader(count, batch, rank, after, dataloader_drop_last=drop)
        resumed.load_state_dict(states[0])
        seen += flat(resumed)
    if drop:
        assert len(seen) == len(set(seen)) and count - len(seen) < batch * (before + after)
    else:
        assert set(seen) == set(range(count))
        assert len(seen) - count < after


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_over_epochs_with_prefetching_workers(workers: int) -> None:
    straight = loader(22, 3, 1, 2, num_local_io_workers=workers)
    expected = [list(batch) for _ in range(3) for batch in straight]
    assert expected[:4] != expected[4:8], "every epoch has an order of its own"
    for stop in range(1, len(expected)):
        first = RepeatingLoader(loader(22, 3, 1, 2))
        done = [next(first) for _ in range(stop)]
        second = loader(22, 3, 1, 2, num_local_io_workers=workers if stop == 6 else 0)
        resumed = RepeatingLoader(second)
        resumed.load_state_dict(first.state_dict())
        assert done + [next(resumed) for _ in range(len(expected) - stop)] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_the_global_random_numbers_alone(workers: int) -> None:
    before = torch.get_rng_state()
    next(iter(DeepSpeedDataLoader(list(range(8)), 2, num_local_io_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_of_different_ranks_and_epochs_draw_different_numbers() -> None:
    class Drawn(torch.utils.data.Dataset[float]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> float:
            return float(torch.rand(()))

    def first(rank: int, epoch: int) -> float:
        loader = DeepSpeedDataLoader(
            Drawn(), 1, num_local_io_workers=1, data_parallel_world_size=2, data_parallel_rank=rank
        )
        loader.set_epoch(epoch)
        return float(next(iter(loader)))

    assert len({first(0, 0), first(1, 0), first(0, 1), first(1, 1)}) == 4


def test_a_completed_epoch_advances_and_an_abandoned_one_begins_anew() -> None:
    data = loader(12, 2)
    first = [list(batch) for batch in data]
    assert data.epoch == 0
    second = next(iter(data))
    assert data.epoch == 1 and second != first[0]
    assert next(iter(data)) == second
    data.set_epoch(0)
    assert [list(batch) for batch in data] == first


def test_taking_exactly_all_batches_completes_the_epoch() -> None:
    data = loader(6, 2)
    taken = [list(next(data)) for _ in range(3)]
    assert sorted(flat(taken)) == list(range(6))
    assert data.state_dict() == {"epoch": 1, "consumed": 0, "seed": 0, "shuffle": True, "num_samples": 6}
    with pytest.raises(StopIteration):
        next(data)


@pytest.mark.parametrize(
    ("count", "batch", "world", "drop"), [(10, 3, 2, False), (10, 3, 2, True), (7, 2, 3, False), (2, 4, 1, True)]
)
def test_len_is_the_number_of_batches(count: int, batch: int, world: int, drop: bool) -> None:
    data = loader(count, batch, 0, world, dataloader_drop_last=drop)
    assert len(data) == len(list(data))


def test_other_data_is_refused() -> None:
    state = loader(10, 2).state_dict()
    with pytest.raises(ValueError, match=r"10 samples.*11"):
        loader(11, 2).load_state_dict(state)


def test_iterable_dataset_is_left_whole_and_resumes() -> None:
    data = loader(0, 3, dataset=Numbers(10))
    assert flat(data) == list(range(10)) and len(data) == 4
    again = loader(0, 3, dataset=Numbers(10))
    taken = flat(itertools.islice(again, 2))
    resumed = loader(0, 3, dataset=Numbers(10))
    resumed.load_state_dict(again.state_dict())
    assert taken + flat(resumed) == list(range(10))
    assert flat(resumed) == list(range(10)), "the next epoch is whole"


def test_a_sampler_of_the_users_is_resumed_too() -> None:
    order = [4, 2, 0, 5, 1, 3]
    first = loader(6, 2, data_sampler=order)
    taken = flat(itertools.islice(first, 1))
    resumed = loader(6, 2, data_sampler=order)
    resumed.load_state_dict(first.state_dict())
    assert taken + flat(resumed) == order and len(first) == 3


def test_throughput_timer_is_started_before_each_batch() -> None:
    class Timer:
        starts = 0

        def start(self) -> None:
            self.starts += 1

    timer = Timer()
    assert len(list(loader(6, 2, tput_timer=timer))) == 3
    assert timer.starts == 4  # the last one finds the end


def test_default_collation_makes_tensors() -> None:
    data = DeepSpeedDataLoader(TensorDataset(torch.arange(4.0)), 2, True, -1, None)
    assert sorted(torch.cat([batch[0] for batch in data]).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("batch", "rank", "world", "match"), [(0, 0, 1, "batch_size is 0"), (1, 2, 2, "rank is 2")])
def test_impossible_arguments(batch: int, rank: int, world: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        loader(4, batch, rank, world)


def test_repeating_a_torch_loader_reshuffles() -> None:
    sampler = DistributedSampler(range(8), num_replicas=1, rank=0)
    endless = RepeatingLoader(DataLoader(list(range(8)), batch_size=8, sampler=sampler))
    first, second = next(endless).tolist(), next(endless).tolist()
    assert sorted(first) == sorted(second) and first != second
    with pytest.raises(TypeError, match="DataLoader has no state_dict"):
        endless.state_dict()


def test_repeating_an_empty_loader_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="yields no batch"):
        next(RepeatingLoader([]))
