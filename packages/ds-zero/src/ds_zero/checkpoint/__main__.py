"""`python -m ds_zero.checkpoint verify DIR [-t TAG | --all]`: exit status 0 if every byte is as it was written."""

from __future__ import annotations

import sys

from ds_zero.checkpoint.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
