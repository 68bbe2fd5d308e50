"""ds-comm alone: collectives with labels, what they cost, and what happens when one rank goes another way.

Quick run: torchrun --standalone --nproc-per-node 2 examples/ds_comm_collectives.py

Without a launcher (python examples/ds_comm_collectives.py) the world has one rank.
"""

from __future__ import annotations

import torch
from rich.console import Console

import ds_comm


def main() -> None:
    ds_comm.init_distributed()  # the environment of torchrun, MPI or SLURM; else a world of one rank
    rank, size = ds_comm.get_rank(), ds_comm.get_world_size()
    comm = ds_comm.communicator()  # the group bound to its transport: shared memory between CPU ranks of one host
    comm.ledger.timing = True  # counts are always on, times only when asked for

    # The functions have torch.distributed's names and signatures, and a label for the ledger and for errors.
    gradients = torch.full((1_000_000,), float(rank + 1))
    ds_comm.all_reduce(gradients, label="gradients")
    assert gradients[0] == size * (size + 1) / 2

    mine = torch.empty(1_000_000 // size)
    work = ds_comm.reduce_scatter_tensor(mine, torch.ones(1_000_000 // size * size), async_op=True, label="shard")
    work.wait()
    assert mine[0] == size

    # A window is a flat buffer that stays: on one host it *is* shared memory, so a gather copies nothing.
    window = comm.gather_window(1_000_000 // size * size, torch.bfloat16, label="parameters")
    window.shard.fill_(rank)
    window.publish()
    window.gather()
    assert window.full[-1] == size - 1
    window.close()

    console = Console(width=100)
    if rank == 0:
        console.print(f"{size} ranks, transport {comm.kind}")
        console.print(comm.ledger.table(by_label=True))

    # Rank 0 reduces where the others gather: every rank is told at once, instead of hanging until a timeout.
    try:
        if rank == 0:
            ds_comm.all_reduce(torch.ones(4), label="loss")
        else:
            ds_comm.all_gather_into_tensor(torch.empty(4 * size), torch.ones(4), label="layers.7")
        ds_comm.barrier()
    except ds_comm.DivergenceError as error:
        if rank == 0:
            console.print(f"DivergenceError: {error}", soft_wrap=True)
    else:
        assert size == 1, "a divergence went unnoticed"
    ds_comm.destroy_process_group()


if __name__ == "__main__":
    main()
