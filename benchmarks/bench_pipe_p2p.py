"""Messages from rank to rank on one host: `ds_comm` through shared memory against gloo's send and receive.

A call is a round trip (there and back, so that one clock measures both ways; half of it is a message), timed on rank 0,
in turns: `send/recv` with the names of torch.distributed, `channel` as ds-pipe uses it: the payload is copied once,
into shared memory, and the receiver's tensor lies there. A byte that another core has written costs more to read than
one of one's own, so both are also timed with a read of every received byte (`and read`).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import _common
import torch
import torch.distributed as dist
from _common import Bench
from _ranks import SOURCES, Contender, free_port

RANKS = 2
SIZES = (1_000_000, 4_000_000, 16_000_000, 64_000_000)
Call = Callable[[], object]
Timings = dict[tuple[str, str], list[float]]


def calls(rank: int, nbytes: int) -> dict[tuple[str, str], Call]:
    """Round trips; keys are (op, transport)."""
    import ds_comm

    peer = 1 - rank
    payload, box = torch.ones(nbytes // 2, dtype=torch.bfloat16), torch.empty(nbytes // 2, dtype=torch.bfloat16)
    channel = ds_comm.communicator().channel(peer, tag=1)

    def put() -> None:
        packet = channel.packet(nbytes)
        packet.data.view(torch.bfloat16).copy_(payload)
        packet.send().wait()

    def take(read: bool) -> None:
        receipt = channel.receive(nbytes)
        receipt.wait()
        if read:
            receipt.data.view(torch.int16).max()

    def receive_and_read() -> None:
        dist.recv(box, peer)
        box.view(torch.int16).max()

    def both_ways(send: Call, receive: Call) -> Call:
        first, second = (send, receive) if rank == 0 else (receive, send)

        def round_trip() -> None:
            first()
            second()

        return round_trip

    return {
        ("send/recv", "torch gloo"): both_ways(lambda: dist.send(payload, peer), lambda: dist.recv(box, peer)),
        ("send/recv", "ds_comm shm"): both_ways(lambda: ds_comm.send(payload, peer), lambda: ds_comm.recv(box, peer)),
        ("channel", "ds_comm shm"): both_ways(put, lambda: take(False)),
        ("send/recv and read", "torch gloo"): both_ways(lambda: dist.send(payload, peer), receive_and_read),
        ("channel and read", "ds_comm shm"): both_ways(put, lambda: take(True)),
    }


def run_rank(rank: int, port: int, nbytes: int, rounds: int, repeats: int, folder: str) -> None:
    """One rank: every call in turns; rank 0 leaves the timings in `folder`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import ds_comm

    ds_comm.init_distributed("gloo")
    table = calls(rank, nbytes)
    timings: Timings = {key: [] for key in table}
    for round_ in range(rounds + 1):
        for key, call in table.items():
            for _ in range(repeats):
                ds_comm.barrier()
                start = time.perf_counter()
                call()
                if round_:  # the first turn warms up
                    timings[key].append((time.perf_counter() - start) / 2)
    if rank == 0:
        torch.save(timings, Path(folder) / "timings.pt")
    ds_comm.destroy_process_group()


def main() -> None:
    """Every size; one line per call."""
    parser = _common.options(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=4, help="calls of a turn")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = SOURCES  # the ranks inherit it
    with Bench("pipe_p2p", options) as bench:
        for nbytes in SIZES:
            arguments = (free_port(), nbytes, 2 if options.quick else options.rounds, options.repeats)
            torch.multiprocessing.spawn(run_rank, (*arguments, str(bench.scratch)), nprocs=RANKS)
            report(bench, nbytes, torch.load(bench.scratch / "timings.pt", weights_only=True))


def report(bench: Bench, nbytes: int, found: Timings) -> None:
    """Write and show one size's figures."""
    for (op, transport), seconds in found.items():
        contender = Contender("message", "-", "bf16", world_size=RANKS)
        median = statistics.median(seconds)
        peer = "send/recv and read" if op.endswith("read") else "send/recv"
        gloo = statistics.median(found[peer, "torch gloo"])
        figures = {"call_s": _common.summary(seconds), "gloo_over_this": gloo / median}
        bench.write(contender, op=op, transport=transport, nbytes=nbytes, **figures)
        rate = f"{nbytes / median / 1e9:6.2f} GB/s, gloo takes {gloo / median:5.2f} x as long"
        print(f"{op:18} {nbytes / 1e6:5.1f} MB {transport:12} {median * 1e3:8.3f} ms  {rate}", flush=True)


if __name__ == "__main__":
    main()
