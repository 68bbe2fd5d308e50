"""The console commands: `deepspeed` (also `ds`, `deepspeed.pt`) and `ds_report` (also `dsr`).

Only what a command needs is imported, when it is needed: `deepspeed --help` and `--version` import no torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_COMMANDS = {"config": "deepspeed.config.command", "plan": "deepspeed.planner.command"}
"""First argument -> the module whose `main` takes the rest. A script of such a name is started as `./config`."""


def main(args: Sequence[str] | None = None) -> int:
    """`deepspeed [options] script [args]`, `deepspeed config ...` or `deepspeed plan ...`: returns the exit code."""
    words = list(sys.argv[1:] if args is None else args)
    if words and words[0] in _COMMANDS:
        return int(importlib.import_module(_COMMANDS[words[0]]).main(words[1:]))
    from deepspeed.launcher.runner import main as run

    return run(words)


def report_main(args: Sequence[str] | None = None) -> int:
    """`ds_report`: shows what is installed, what is missing and what to do about it; returns the exit code, 0."""
    from deepspeed.env_report import main as report

    return report(args)


if __name__ == "__main__":
    sys.exit(main())
