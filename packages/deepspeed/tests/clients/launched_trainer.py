"""Starts one case of hf_cases.py as a script of its own; test_launchers.py runs it through the launcher.

Arguments: the model's folder, where to write, the ZeRO stage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hf_cases

folder, out, stage = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
found = hf_cases.train("full", folder, out, hf_cases.ds_config(stage))
if hf_cases.rank() == 0:
    (out / "found.json").write_text(json.dumps(found))
