"""`nox -s demo`: launch the fine-tuning, kill a rank with SIGKILL, resume, and check what is claimed.

The script that is launched knows nothing of this: the driver watches steps.jsonl, picks rank 1's process from the
launcher's pid file, and kills it. Checked: the launcher fails and leaves no rank behind; the resumed run repeats the
losses of the killed one to the bit; the exported folder generates, loaded by transformers alone, the text that the
sharded model generated.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data import NEW_TOKENS
from finetune.report import write_report

NUM_RANKS = 2
STEPS_AFTER_SAVE = 3
"""Steps that the killed run makes beyond its checkpoint; these are the ones to compare."""

console = Console(highlight=False)


def run_demo(script: Path, args: argparse.Namespace) -> None:
    """All phases; SystemExit with a message if a check fails."""
    start = time.monotonic()
    output: Path = args.output
    for name in ("steps.jsonl", "summary.json", "demo.json", "report.html"):
        (output / name).unlink(missing_ok=True)
    for name in ("checkpoints", "model"):
        shutil.rmtree(output / name, ignore_errors=True)

    options = [option for option in sys.argv[1:] if option != "--demo"]
    console.rule("[bold]1. Train until a rank is killed")
    killed = _launch_and_kill(script, options, output, args.save_every + STEPS_AFTER_SAVE)
    console.rule(f"[bold]2. Resume from {(output / 'checkpoints' / 'latest').read_text().strip()}")
    _check(_launch(script, [*options, "--resume"]).wait() == 0, "the resumed run failed")

    console.rule("[bold]3. Check")
    compared = _compare(output)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    generated = _generate_from_export(output / "model", args.prompt)
    agrees = generated == summary["text_after"]
    console.print(f"{output / 'model'}, loaded by transformers alone: {generated!r}")
    console.print("that is what the sharded model generated" if agrees else f"not {summary['text_after']!r}")
    facts = {"story": killed, "compared": compared, "export_agrees": agrees}
    (output / "demo.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    console.print(f"report: {write_report(output)}   ({time.monotonic() - start:.0f} s in all)")
    _check(all(first == second for _, first, second in compared), "the resumed losses differ")
    _check(agrees, "the exported model generates another text")


def _launch(script: Path, options: list[str]) -> subprocess.Popen[bytes]:
    beside = Path(sys.executable).with_name("deepspeed")
    command = [str(beside)] if beside.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += ["--num_gpus", str(NUM_RANKS), "--save_pid", str(script), *options]
    console.print("$ " + shlex.join([Path(command[0]).name, *command[1:]]), style="dim", soft_wrap=True)
    environ = dict(os.environ)
    if torch.accelerator.device_count() < NUM_RANKS:
        environ["DS_ACCELERATOR"] = "cpu"
    return subprocess.Popen(command, env=environ)


def _launch_and_kill(script: Path, options: list[str], output: Path, kill_after: int) -> str:
    """Train, kill rank 1 once `kill_after` steps are done and the checkpoint is committed; what happened, in words."""
    launcher = _launch(script, options)
    pid_file = Path(tempfile.gettempdir()) / f"{launcher.pid}.deepspeed"
    latest = output / "checkpoints" / "latest"
    try:
        while _last_step(output) < kill_after or not latest.exists():
            _check(launcher.poll() is None, "training ended before a rank was killed")
            time.sleep(0.05)
        pids = [int(pid) for pid in pid_file.read_text().split(",")]
        time.sleep(0.7)  # into the next step
        os.kill(pids[1], signal.SIGKILL)
        killed_at, step = time.monotonic(), _last_step(output)
        code = launcher.wait(timeout=60)
    finally:
        launcher.terminate()
        launcher.wait()
        console.show_cursor(True)  # the killed display had hidden it
    seconds = time.monotonic() - killed_at
    _check(code != 0, "the launcher ended with exit code 0 although a rank was killed")
    left = [pid for pid in pids if psutil.pid_exists(pid)]
    _check(not left, f"processes {left} outlived the launcher")
    story = (
        f"Rank 1 (process {pids[1]}) was killed by SIGKILL during step {step + 1}. {seconds:.1f} s later the launcher "
        f"had ended with exit code {code}, and none of the {len(pids)} ranks was left."
    )
    console.print(f"\n{story}", style="bold")
    return story


def _rows(output: Path) -> list[dict[str, Any]]:
    file = output / "steps.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []  # the last may be half written
    return [json.loads(line) for line in lines]


def _last_step(output: Path) -> int:
    rows = _rows(output)
    return rows[-1]["step"] if rows else 0


def _compare(output: Path) -> list[tuple[int, float, float]]:
    """(step, loss in the killed run, loss in the resumed run) for the steps that both made."""
    losses: dict[str, dict[int, float]] = {}
    for row in _rows(output):
        losses.setdefault(row["run"], {})[row["step"]] = row["loss"]
    first, second = losses.values()
    common = sorted(first.keys() & second.keys())
    _check(bool(common), "the two runs have no step in common")
    table = Table("step", "loss, killed run", "loss, resumed run", "", box=None, padding=(0, 3, 0, 0))
    for step in common:
        same = "same bits" if first[step] == second[step] else "DIFFERENT"
        table.add_row(str(step), repr(first[step]), repr(second[step]), same)
    console.print(table)
    return [(step, first[step], second[step]) for step in common]


def _generate_from_export(folder: Path, prompt: str) -> str:
    """What the exported model makes of the prompt, without this project's code."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise SystemExit(f"demo failed: {problem}")
