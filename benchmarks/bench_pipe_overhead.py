"""What the executor of a pipeline costs where the layers have nothing to do: 1F1B on tiny tensors, two stages.

Each stage is one multiplication by one weight. An action is a forward or a backward of one micro-batch with its
messages, waiting included: a step's time over the last stage's actions. `torch calls alone` are those of the last
stage (forward, loss, backward into weight and input) in a loop without a pipeline, so what is above them is overhead.
The peer is `torch.distributed.pipelining`'s `Schedule1F1B`, in the same processes, in turns.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import _common
import torch
import torch.distributed as dist
from _common import Bench
from _ranks import SOURCES, Contender, free_port
from torch import Tensor, nn

RANKS = 2
ROWS = 4
ALONE = "torch calls alone"
Step = Callable[[], object]


class Scale(nn.Module):
    """One multiplication: as little as a layer can do and still have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, labels)


def contenders(rank: int, num: int) -> dict[str, Step]:
    """A step of `num` micro-batches each, gradients left in `.grad`."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    import ds_pipe

    inputs, labels = torch.ones(num * ROWS, 8), torch.zeros(num * ROWS, 8)
    pairs = list(zip(inputs.chunk(num), labels.chunk(num), strict=True))
    layer = Scale()
    ours = ds_pipe.pipeline(layer, schedule="1f1b", num_micro_batches=num, loss_fn=loss_fn)
    stage = PipelineStage(Scale(), rank, RANKS, torch.device("cpu"))
    theirs = Schedule1F1B(stage, num, loss_fn=loss_fn)
    alone = Scale()

    def torch_step() -> None:
        if rank == 0:
            theirs.step(inputs)
        else:
            theirs.step(target=labels, losses=[])

    def torch_calls() -> None:
        for one, label in pairs if rank == RANKS - 1 else []:
            received = one.detach().requires_grad_()
            (loss_fn(alone(received), label) / num).backward()

    return {
        "ds_pipe": lambda: ours.train_batch(iter(pairs)),
        "torch.distributed.pipelining": torch_step,
        ALONE: torch_calls,
    }


def run_rank(rank: int, port: int, num: int, rounds: int, repeats: int, folder: str) -> None:
    """One stage; rank 0 leaves the seconds of every step in `folder`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import ds_comm

    ds_comm.init_distributed("gloo")
    table = contenders(rank, num)
    timings: dict[str, list[float]] = {name: [] for name in table}
    for round_ in range(rounds + 1):
        for name, step in table.items():
            for _ in range(repeats):
                ds_comm.barrier()
                start = time.perf_counter()
                step()
                seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                if round_:  # the first turn warms up
                    timings[name].append(float(seconds))
    if rank == 0:
        torch.save(timings, Path(folder) / "timings.pt")
    ds_comm.destroy_process_group()


def main() -> None:
    """Few and many micro-batches; one line per contender."""
    parser = _common.options(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=8, help="steps of a turn")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = SOURCES  # the ranks inherit it
    with Bench("pipe_overhead", options) as bench:
        for num in (8, 32):
            arguments = (free_port(), num, 2 if options.quick else options.rounds, options.repeats)
            torch.multiprocessing.spawn(run_rank, (*arguments, str(bench.scratch)), nprocs=RANKS)
            found = torch.load(bench.scratch / "timings.pt", weights_only=True)
            actions = {name: _common.summary([one / (2 * num) for one in seconds]) for name, seconds in found.items()}
            for name, action in actions.items():
                contender = Contender("pipeline", "empty", "fp32", world_size=RANKS)
                overhead = action["median"] - actions[ALONE]["median"]
                figures = {"action_s": action, "overhead_s": overhead}
                bench.write(contender, runs=name, schedule="1f1b", num_micro_batches=num, **figures)
                text = f"{action['median'] * 1e6:6.1f} us per action, {overhead * 1e6:6.1f} us above the calls alone"
                print(f"{num:3} micro-batches  {name:30} {text}", flush=True)


if __name__ == "__main__":
    main()
