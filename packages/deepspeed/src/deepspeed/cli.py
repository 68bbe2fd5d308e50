"""The console commands: `deepspeed` (also `ds`, `deepspeed.pt`) and `ds_report` (also `dsr`).

Only what a command needs is imported, when it is needed: `deepspeed --help` and `--version` import no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """`deepspeed [options] script [args]`: returns the exit code."""
    from deepspeed.launcher.runner import main as run

    return run(args)


def report_main(args: Sequence[str] | None = None) -> int:
    """`ds_report`: shows what is installed, what is missing and what to do about it; returns the exit code, 0."""
    from deepspeed.env_report import main as report

    return report(args)


if __name__ == "__main__":
    sys.exit(main())
