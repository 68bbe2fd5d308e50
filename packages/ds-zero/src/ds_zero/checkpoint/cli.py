"""Command line of checkpoints: `verify`, and `export` to a safetensors folder that transformers loads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_zero.checkpoint.consolidate import export_safetensors
from ds_zero.checkpoint.durable import committed_tags
from ds_zero.checkpoint.integrity import VerifyReport, verify
from ds_zero.errors import CheckpointError

__all__ = ["main"]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _show(report: VerifyReport) -> None:
    _say(f"{report.path}: {'ok' if report.ok else 'DAMAGED'}")
    for file in report.files:
        size = f", {file.nbytes} bytes" if file.nbytes else ""
        _say(f"  {file.name}{size}: {'ok' if file.ok else 'DAMAGED'}")
        for error in file.errors:
            _say(f"    {error}")


def _verify(args: argparse.Namespace) -> int:
    tags: list[str | None] = [args.tag]
    if args.all:
        tags = list(committed_tags(args.directory))
        if not tags:
            raise CheckpointError(f"{args.directory} holds no complete checkpoint")
    reports = [verify(args.directory, tag) for tag in tags]
    for report in reports:
        _show(report)
    return 0 if all(report.ok for report in reports) else 1


def _export(args: argparse.Namespace) -> int:
    for path in export_safetensors(
        args.directory, args.output, dtype=args.dtype, max_shard_size=args.max_shard_size, tag=args.tag
    ):
        _say(str(path))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ds_zero.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="read every byte and compare it with the checksums of the manifest")
    check.add_argument("directory", type=Path, help="the folder that holds `latest`, or one tag's folder")
    check.add_argument("-t", "--tag", help="which checkpoint (default: what `latest` names)")
    check.add_argument("--all", action="store_true", help="every tag of the folder")
    check.set_defaults(run=_verify)
    export = commands.add_parser("export", help="write the weights as a safetensors folder")
    export.add_argument("directory", type=Path)
    export.add_argument("output", type=Path)
    export.add_argument("-t", "--tag")
    export.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16 (default fp32)")
    export.add_argument("--max_shard_size", default="5GB")
    export.set_defaults(run=_export)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command; 0 good, 1 damaged, 2 nothing to work on."""
    args = _parser().parse_args(list(argv))
    try:
        return int(args.run(args))
    except CheckpointError as error:
        sys.stderr.write(f"{error}\n")
        return 2
