"""Checkpoints of SmolLM2 at stages 2 and 3, paired: this project and upstream DeepSpeed.

Per contender and round, on two ranks:
- `stall_s`: how much longer training takes for a save: the call itself plus what the next steps lose against the
  steps before it.
- `durable_s`: from the call until everything is on the disk, ranks idle meanwhile. `latest` naming the tag is taken as
  "complete"; then every file is fsynced from outside, which costs nothing where it was done already. `dd_s` is
  `dd conv=fsync` of as many bytes into the same folder, right after.
- `extra_mb`: peak resident memory of a rank during a save that trains on, above the peak of the steps before it.
- `bytes_per_parameter` on disk, and `load_s`: the call that reads it back, optimizer state included, five seconds after
  the save was durable: from the page cache as far as the save has left the files there.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import _common
from _common import Bench
from _ranks import Contender, RankGroup

STEPS = 3
DURABLE_TIMEOUT_S = 300.0
SETTLE_S = 5.0
"""Between a durable save and the load: a save that went past the page cache fills it afterwards."""


def main() -> None:
    """Run the stages asked for and append their results."""
    parser = _common.options(__doc__)
    parser.add_argument("--model", choices=("smollm2", "gpt"), default="smollm2")
    parser.add_argument("--stage", type=int, choices=range(4))
    parser.add_argument("--rounds", type=int, help="saves of each sort per contender (default 3, quick 1)")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    with Bench("checkpoint", options) as bench:
        for stage in (2, 3) if options.stage is None else (options.stage,):
            pair = [Contender("engine", options.model, "bf16", stage, upstream=peer) for peer in (False, True)]
            with bench.started(bench.chosen(pair)) as groups:
                figures: list[list[dict[str, float]]] = [[] for _ in groups]
                for group in groups:
                    group.steps(1)
                for round_ in range(rounds):
                    for group, mine in zip(groups, figures, strict=True):
                        mine.append(measure(group, bench.scratch / group.contender.label, round_))
                for group, mine in zip(groups, figures, strict=True):
                    report(bench, group, mine)


def measure(group: RankGroup, folder: Path, round_: int) -> dict[str, float]:
    """One save between steps, one save at rest, one load, one `dd`."""
    training, resting = f"training{round_}", f"resting{round_}"
    result = during_training(group, folder, training)
    await_durable(folder, training)

    call, started = save(group, folder, resting)
    await_durable(folder, resting)
    result["save_s"], result["durable_s"] = call, time.time() - started
    nbytes = size(folder / resting)
    result["bytes_per_parameter"] = nbytes / group.ready["numel"]

    time.sleep(SETTLE_S)
    answers = group.ask({"do": "load", "folder": str(folder), "tag": resting})
    result["load_s"] = max(answer["seconds"] for answer in answers)
    result["dd_s"] = dd(folder, nbytes)
    shutil.rmtree(folder)
    return result


def during_training(group: RankGroup, folder: Path, tag: str) -> dict[str, float]:
    """Steps, a save, steps: what the save cost them."""
    sampler = group.sample_memory()
    try:
        sampler.reset()
        before = group.steps(STEPS).seconds
        quiet = sampler.read()
        sampler.reset()
        call, _ = save(group, folder, tag)
        after = group.steps(STEPS).seconds
        busy = sampler.read()
    finally:
        sampler.stop()
        group.sampler = None
    usual = statistics.median(before)
    lost = max(0.0, sum(after) - usual * len(after))
    return {
        "save_training_s": call,
        "stall_s": call + lost,
        "extra_mb": max(0.0, busy["hwm_mb"] - quiet["hwm_mb"]),
        "extra_pss_mb": max(0.0, busy["pss_mb"] - quiet["pss_mb"]),
    }


def save(group: RankGroup, folder: Path, tag: str) -> tuple[float, float]:
    """Seconds of the slowest rank's call, and the wall-clock time when the first rank called."""
    answers = group.ask({"do": "save", "folder": str(folder), "tag": tag})
    return max(answer["seconds"] for answer in answers), min(answer["started"] for answer in answers)


def await_durable(folder: Path, tag: str) -> None:
    """Return when `latest` names `tag` and every byte of the checkpoint has been fsynced."""
    deadline = time.monotonic() + DURABLE_TIMEOUT_S
    latest = folder / "latest"
    while not latest.exists() or latest.read_text().strip() != tag:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{latest} does not name {tag!r} after {DURABLE_TIMEOUT_S:.0f} s")
        time.sleep(0.005)
    for path in [latest, *(path for path in (folder / tag).rglob("*") if path.is_file())]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dd(folder: Path, nbytes: int) -> float:
    """Seconds of `dd conv=fsync` of `nbytes` zeros, in MiB blocks, into `folder`."""
    target = folder / "dd"
    start = time.perf_counter()
    blocks = ["bs=1M", f"count={nbytes}", "iflag=count_bytes"]
    subprocess.run(["dd", "if=/dev/zero", f"of={target}", *blocks, "conv=fsync", "status=none"], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def report(bench: Bench, group: RankGroup, rounds: list[dict[str, float]]) -> None:
    """One result line: every figure's summary over the rounds."""
    figures: dict[str, Any] = {key: _common.summary([one[key] for one in rounds]) for key in rounds[0]}
    bench.write(group.contender, **figures, **group.ready)
    medians = ", ".join(f"{key} {value['median']:.3f}" for key, value in figures.items())
    print(f"  {group}: {medians}", flush=True)


if __name__ == "__main__":
    main()
