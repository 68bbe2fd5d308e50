"""Collectives of two ranks on one host: `ds_comm` (shm, and gloo by all_to_all) against torch's gloo.

Every call has the same input and output on all sides and is timed from a barrier to the slowest rank's return, in
turns. "window" is what ds-zero uses, where the data already lies in the window: a reduction into fp32, and, for
gathering, publish, gather and a read of every byte (reading is where shared memory pays, so it must be in the figure;
the `read` rows show what reading costs alone).
`all_to_all + add` is the reduce-scatter a user could write with gloo's own all_to_all.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import _common
import models
import torch
import torch.distributed as dist
from _common import Bench
from _ranks import SOURCES, Contender, free_port

RANKS = 2
SIZES = (1 << 20, 33_554_432)
Call = Callable[[], object]
Timings = dict[tuple[str, str], list[float]]


def torch_calls(numel: int, dtype: torch.dtype) -> dict[tuple[str, str], Call]:
    """torch.distributed on gloo; keys are (op, transport)."""
    full, out = torch.ones(numel, dtype=dtype), torch.zeros(numel // RANKS, dtype=dtype)
    pieces = torch.empty(numel, dtype=dtype)

    def exchange_and_add() -> None:
        dist.all_to_all_single(pieces, full)
        torch.add(pieces[: numel // RANKS], pieces[numel // RANKS :], out=out)

    return {
        ("reduce_scatter", "torch gloo"): lambda: dist.reduce_scatter_tensor(out, full),
        ("reduce_scatter", "all_to_all + add"): exchange_and_add,
        ("all_gather", "torch gloo"): lambda: dist.all_gather_into_tensor(pieces, out),
        ("all_reduce", "torch gloo"): lambda: dist.all_reduce(full),
        ("read", "own memory"): lambda: pieces.view(torch.int16).max(),
    }


def ds_calls(numel: int, dtype: torch.dtype) -> dict[tuple[str, str], Call]:
    """`ds_comm` on the transport this world has."""
    import ds_comm

    communicator = ds_comm.communicator()
    name = f"ds_comm {communicator.kind}"
    full, out = torch.ones(numel, dtype=dtype), torch.zeros(numel // RANKS, dtype=dtype)
    pieces = torch.empty(numel, dtype=dtype)
    reduce = communicator.reduce_window(numel, dtype, label="reduce")
    gather = communicator.gather_window(numel, dtype, label="gather")
    reduce.local.fill_(1)
    gather.shard.fill_(1)
    total = torch.zeros(numel // RANKS)

    def publish_and_gather() -> None:
        gather.publish()
        gather.gather()
        gather.full.view(torch.int16).max()
        communicator.barrier(label="read")  # nobody may publish while a peer still reads

    return {
        ("reduce_scatter", name): lambda: ds_comm.reduce_scatter_tensor(out, full),
        ("all_gather", name): lambda: ds_comm.all_gather_into_tensor(pieces, out),
        ("all_reduce", name): lambda: ds_comm.all_reduce(full),
        ("reduce_scatter to fp32", f"{name} window"): lambda: reduce.reduce_scatter(total).wait(),
        ("all_gather and read", f"{name} window"): publish_and_gather,
    }


def run_rank(
    rank: int, port: int, transport: str | None, numel: int, dtype: str, rounds: int, calls: int, folder: str
) -> None:
    """One rank of one world: every call in turns; rank 0 leaves the timings in `folder`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if transport is None:
        table = torch_calls(numel, models.DTYPES[dtype])
    else:
        os.environ["DS_COMM_TRANSPORT"] = transport
        import ds_comm

        ds_comm.init_distributed()
        table = ds_calls(numel, models.DTYPES[dtype])
    timings: Timings = {key: [] for key in table}
    for round_ in range(rounds + 1):
        for key, call in table.items():
            for _ in range(calls):
                dist.barrier()
                start = time.perf_counter()
                call()
                seconds = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                if round_:  # the first turn warms up
                    timings[key].append(float(seconds))
    if rank == 0:
        torch.save(timings, Path(folder) / "timings.pt")
    dist.destroy_process_group()


def main() -> None:
    """Every size, dtype and world; one line per call."""
    parser = _common.options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4, help="calls of a turn")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = SOURCES  # the ranks inherit it
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"  # torch renames its collectives; the old names still stand
    worlds = {"torch": None, "shm": "shm", "gloo": "gloo"}
    chosen = [worlds[name] for name in (options.only.split(",") if options.only else worlds)]
    with Bench("comm_collectives", options) as bench:
        for dtype in ("bf16",) if options.quick else ("bf16", "fp32"):
            for nbytes in SIZES[1:] if options.quick else SIZES:
                measure(bench, chosen, dtype, nbytes)


def measure(bench: Bench, worlds: list[str | None], dtype: str, nbytes: int) -> None:
    """One size in all worlds; the worlds are repeated in rounds, so that drift hits all alike."""
    numel = nbytes // models.DTYPES[dtype].itemsize
    found: Timings = {}
    for _ in range(1 if bench.options.quick else 2):
        for transport in worlds:
            arguments = (free_port(), transport, numel, dtype, bench.options.rounds, bench.options.calls)
            torch.multiprocessing.spawn(run_rank, (*arguments, str(bench.scratch)), nprocs=RANKS)
            for key, seconds in torch.load(bench.scratch / "timings.pt", weights_only=True).items():
                found.setdefault(key, []).extend(seconds)
    contender = Contender("collective", "-", dtype, world_size=RANKS)
    for (op, transport), seconds in sorted(found.items()):
        bench.write(contender, op=op, transport=transport, nbytes=nbytes, call_s=_common.summary(seconds))
        median = statistics.median(seconds) * 1e3
        print(f"{op:24} {dtype} {nbytes / 1e6:5.1f} MB {transport:24} {median:8.2f} ms", flush=True)


if __name__ == "__main__":
    main()
