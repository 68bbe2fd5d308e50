"""`python -m deepspeed.checkpoint verify DIR [-t TAG | --all]` and `export DIR OUT`: commands of ds_zero.checkpoint."""

from __future__ import annotations

import sys

from ds_zero.checkpoint.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
