"""The command `deepspeed plan`: what a run will need, without ranks and without a device.

    deepspeed plan --model DIR|config.json --config ds.json --world N [--seq-len S] [--device cuda]
                   [--device-memory 80GB] [--gradient-checkpointing] [--html FILE] [--json]

Exit codes: 0 planned (and it fits, where a memory is given), 1 it does not fit, 2 it cannot be planned.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspeed.planner.advice import advise
from deepspeed.planner.plan import plan_run
from deepspeed.planner.report import as_html, as_json, as_text
from deepspeed.planner.workload import LONGEST_DEFAULT, causal_lm

__all__ = ["main", "parse_size"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "80GB", "40GiB", "16e9". ArgumentTypeError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?\s*", text, re.IGNORECASE)
    try:
        if match is None:
            raise ValueError(text)
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected one such as 80GB, 40GiB or 16e9") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepspeed plan", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="config.json of a transformers model, or its folder")
    parser.add_argument("--config", type=Path, required=True, help="the DeepSpeed config")
    parser.add_argument("--world", type=int, required=True, metavar="N", help="data-parallel ranks")
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="S",
        help=f"tokens per sample (default: the model's longest, at most {LONGEST_DEFAULT})",
    )
    parser.add_argument("--device", default="cuda", help="cpu (all ranks on one host) or cuda (default: %(default)s)")
    parser.add_argument("--device-memory", type=parse_size, metavar="SIZE", help="what a rank may hold: 80GB, 40GiB")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as the model's own switch does")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(args)
    try:
        workload = causal_lm(
            options.model, seq_len=options.seq_len, gradient_checkpointing=options.gradient_checkpointing
        )
        plan = plan_run(workload, options.config, world=options.world, device=options.device)
        memory = options.device_memory
        variants = [] if memory is None else advise(plan, memory)
        if options.html is not None:
            options.html.write_text(as_html(plan, memory, variants), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    width = max(shutil.get_terminal_size((120, 0)).columns, 100)
    text = as_json(plan, memory, variants) if options.json else as_text(plan, memory, variants, width)
    sys.stdout.write(text + "\n")
    return 0 if memory is None or plan.fits(memory) else 1
