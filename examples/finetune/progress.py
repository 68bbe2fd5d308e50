"""What a step cost, shown live on rank 0 and written to steps.jsonl, one line per step.

Where the output is a terminal there is a live table; elsewhere (a log file) one plain line per step.
Communication is read from the ledger that every optimizer keeps: bytes always, waiting time because it is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import deepspeed
import ds_comm.device

_BARS = "▁▂▃▄▅▆▇█"


class Progress:
    """A context in which every optimizer step is between `begin_step()` and `end_step(loss)`, on every rank."""

    def __init__(self, engine: Any, args: argparse.Namespace) -> None:
        self.engine, self.num_steps, self.output = engine, args.steps, Path(args.output)
        self.tokens_per_step = engine.train_batch_size() * args.seq_length
        self.first = deepspeed.comm.get_rank() == 0
        self.ledger = engine.optimizer.comm.ledger
        self.ledger.timing = True
        self.losses: list[float] = []
        self.console = Console()
        self.live = Live(console=self.console, refresh_per_second=4, auto_refresh=False)
        self.log_file = self.output / "steps.jsonl"
        self.run = time.strftime("%H:%M:%S")

    def __enter__(self) -> Progress:
        self.output.mkdir(parents=True, exist_ok=True)
        if self.first and self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.live.stop()

    def begin_step(self) -> None:
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), self.ledger.wait_seconds, self._wire_nbytes()

    def _wire_nbytes(self) -> float:
        return sum(row["wire_nbytes"] for row in self.ledger.summary().values())

    def end_step(self, loss: float) -> None:
        """Note and show what happened since `begin_step`; `loss` is the mean over the ranks."""
        seconds, waited, sent = (now - before for now, before in zip(self._now(), self._before, strict=True))
        self.losses.append(loss)
        row = {
            "run": self.run,
            "step": self.engine.global_steps,
            "loss": loss,
            "grad_norm": self.engine.get_global_grad_norm(),
            "lr": self.engine.get_lr()[0],
            "seconds": seconds,
            "tokens_per_second": self.tokens_per_step / seconds,
            "communication": waited / seconds,
            "wire_nbytes": sent,
            **_memory(self.engine.device),
        }
        if not self.first:
            return
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")  # json writes floats so that they read back to the same bits
        if self.live.is_started:
            self.live.update(self._view(row), refresh=True)
        else:
            print(
                f"step {row['step']:>4}/{self.num_steps}  loss {loss:.4f}  {row['tokens_per_second']:6.0f} tokens/s  "
                f"communication {row['communication']:5.1%}  memory {row['memory_nbytes'] / 1e9:.2f} GB",
                flush=True,
            )

    def _view(self, row: dict[str, Any]) -> Group:
        table = Table(box=None, padding=(0, 3, 0, 0))
        for name in ("step", "loss", "gradient norm", "tokens/s", "communication", "sent per rank", "memory of rank 0"):
            table.add_column(name, style="bold" if name == "loss" else None)
        table.add_row(
            f"{row['step']} of {self.num_steps}",
            f"{row['loss']:.4f}",
            f"{row['grad_norm']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['communication']:.1%} of the time",
            f"{row['wire_nbytes'] / 1e6:,.0f} MB per step",
            f"{row['memory_nbytes'] / 1e9:.2f} GB, peak {row['peak_nbytes'] / 1e9:.2f}",
        )
        return Group(
            ProgressBar(total=self.num_steps, completed=row["step"], width=60), table, sparkline(self.losses[-100:])
        )

    def finish(self, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Leave what the report needs besides the steps; on the first rank."""
        versions = {
            "deepspeed": deepspeed.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        }
        comm = self.engine.optimizer.comm
        summary = {
            "ranks": f"{comm.size} x {self.engine.device.type}, transport {comm.kind}",
            "tokens_per_step": self.tokens_per_step,
            "command": " ".join(sys.argv),
            "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "versions": versions,
            "config": config,
            **state,
        }
        (self.output / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")


def sparkline(values: list[float]) -> str:
    """The values as a line of blocks."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "loss " + "".join(_BARS[round((value - low) * scale)] for value in values)


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes in use now and at most: of the accelerator, or of this process, where pages shared with the other ranks of
    the host are divided among them (now) or counted whole (at most).
    """
    used = ds_comm.device.memory_allocated()
    if device.type == "cpu":
        used = getattr(psutil.Process().memory_full_info(), "pss", used)
    return {"memory_nbytes": used, "peak_nbytes": ds_comm.device.max_memory_allocated()}
