"""The command `deepspeed config`: explain a config file, or write the JSON Schema of all config files.

    deepspeed config explain ds.json [--world 8] [--device cuda] [--all] [--json]
    deepspeed config schema [FILE]

Exit codes: 0 good, 2 the config is refused (the reason is on stderr).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspeed.config.document import SCHEMA_FILE
from deepspeed.config.explain import explain_file
from deepspeed.errors import DeepSpeedConfigError

__all__ = ["main"]


def _explain(args: argparse.Namespace) -> int:
    explanation = explain_file(args.file, world=args.world, device_type=args.device)
    sys.stdout.write((explanation.as_json() if args.json else explanation.text(defaults=args.all)) + "\n")
    return 0


def _schema(args: argparse.Namespace) -> int:
    text = SCHEMA_FILE.read_text(encoding="utf-8")
    if args.file is None:
        sys.stdout.write(text)
    else:
        args.file.write_text(text, encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepspeed config", description="Look at DeepSpeed configs; starts nothing.")
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="the resolved config, each value with where it came from")
    explain.add_argument("file", type=Path, help="the JSON file (comments and trailing commas are fine)")
    explain.add_argument("--world", type=int, metavar="N", help="data-parallel ranks (default: WORLD_SIZE, else 1)")
    explain.add_argument("--device", default="cpu", help="where the model lives: cpu, cuda, ... (default: %(default)s)")
    explain.add_argument("--all", action="store_true", help="show also the keys that have their defaults")
    explain.add_argument("--json", action="store_true", help="all keys, for programs")
    explain.set_defaults(run=_explain)
    schema = commands.add_parser("schema", help="the JSON Schema, for editors")
    schema.add_argument("file", type=Path, nargs="?", help="where to write it (default: stdout)")
    schema.set_defaults(run=_schema)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    options = _parser().parse_args(args)
    try:
        return int(options.run(options))
    except (DeepSpeedConfigError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
