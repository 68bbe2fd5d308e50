"""One rank of one contender: builds it, then obeys its parent (`_ranks.RankGroup`) line by line.

Started with the interpreter of the contender, so it must run under the peer's venv as well as under ours. The
specification comes as JSON in `DS_BENCH_SPEC`, commands as JSON lines on stdin, answers go as JSON lines to the file
descriptor `DS_BENCH_REPLY_FD`; stdout and stderr belong to the contender and end in a log file.
Commands: `{"do": "steps", "count": n}`, `{"do": "save"|"load", "folder": ..., "tag": ...}`, `{"do": "exit"}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any


def resident_mb() -> float:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def version(distribution: str) -> str | None:
    """Installed version, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class Rank:
    """The contender of this process and its place in the data."""

    def __init__(self, spec: dict[str, Any]) -> None:
        start = time.perf_counter()
        import torch

        torch_s = time.perf_counter() - start
        self.deepspeed_version: str | None = None
        if spec["kind"] == "engine":
            import deepspeed

            self.deepspeed_version = deepspeed.__version__
        if spec["model"] == "smollm2":
            # Its lazy imports must be over before upstream's `zero.Init` replaces parts of torch.
            from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
        import contenders
        import models

        self.imported_mb = resident_mb()
        self.import_torch_s, self.import_all_s = torch_s, time.perf_counter() - start
        self.torch, self.models = torch, models
        self.spec, self.folder = spec, Path(spec["folder"])
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.set_num_threads(1)
        self.contender = contenders.KINDS[spec["kind"]](spec, self.folder)
        self.contender.build()
        self.cursor = 0

    def ready(self) -> dict[str, Any]:
        """What is known before the first step."""
        parameters = list(self.contender.model.parameters())
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        return {
            **self.contender.times,
            "import_torch_s": self.import_torch_s,
            "import_all_s": self.import_all_s,
            "imported_mb": self.imported_mb,
            "numel": numel,
            "torch": self.torch.__version__,
            "deepspeed": self.deepspeed_version,
            "transformers": version("transformers"),
        }

    def steps(self, count: int) -> dict[str, Any]:
        """Train `count` steps. All ranks start a step together (an untimed barrier); each reports its own seconds."""
        seconds, cpu_seconds, losses = [], [], []
        for _ in range(count):
            tokens = self.models.batch(self.spec["model"], self.folder, self.cursor, self.rank, self.world_size)
            self.torch.distributed.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = self.contender.step(tokens)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
            losses.append(float(loss))
            self.cursor += 1
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}

    def checkpoint(self, verb: str, folder: str, tag: str) -> dict[str, Any]:
        """Save or load; `started` is wall-clock time, for whoever watches the files from outside."""
        self.torch.distributed.barrier()
        started, start = time.time(), time.perf_counter()
        getattr(self.contender, verb)(folder, tag)
        return {"started": started, "seconds": time.perf_counter() - start}


def main() -> None:
    """Build, answer "ready", then run commands until `exit` or the end of stdin."""
    reply = os.fdopen(int(os.environ["DS_BENCH_REPLY_FD"]), "w")

    def answer(value: dict[str, Any]) -> None:
        reply.write(json.dumps(value) + "\n")
        reply.flush()

    try:
        rank = Rank(json.loads(os.environ["DS_BENCH_SPEC"]))
        answer(rank.ready())
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "exit":
                break
            if command["do"] == "steps":
                answer(rank.steps(command["count"]))
            else:
                answer(rank.checkpoint(command["do"], command["folder"], command["tag"]))
    except BaseException:
        answer({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
