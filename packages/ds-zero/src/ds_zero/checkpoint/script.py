"""The text of `zero_to_fp32.py`, which every save leaves next to `latest`."""

from __future__ import annotations

__all__ = ["SCRIPT", "SCRIPT_NAME"]

SCRIPT_NAME = "zero_to_fp32.py"

SCRIPT = '''#!/usr/bin/env python
"""Make one fp32 model file of this checkpoint: python zero_to_fp32.py . OUTPUT_DIR [-t TAG] [--safe_serialization]

Uses ds_zero where it is installed. Without it, needs only torch, safetensors and the manifest (TAG as with ds_zero;
the output is one model.safetensors, checksums are not verified).
"""
import json
import math
import pathlib
import sys


def plain(argv):
    import argparse

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint_dir", type=pathlib.Path)
    parser.add_argument("output_dir", type=pathlib.Path)
    parser.add_argument("-t", "--tag")
    args = parser.parse_args(argv)
    tag = args.tag or (args.checkpoint_dir / "latest").read_text().strip()
    folder = args.checkpoint_dir / tag
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [safe_open(folder / item["name"], framework="pt") for item in manifest["files"]]
    state = {}
    for name, param in manifest["params"].items():
        key = "master" if "master" in param["keys"] else "param"
        flat = torch.empty(math.prod(param["shape"]), dtype=torch.float32)
        for file, start, stop, _ in param["keys"][key]["spans"]:
            flat[start:stop] = files[file].get_tensor(f"{key}/{name}/{start}-{stop}").float()
        state[name] = flat.view(param["shape"])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_file(state, args.output_dir / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    try:
        from ds_zero.checkpoint.zero_to_fp32 import main
    except ImportError:
        main = plain
    sys.exit(main(sys.argv[1:]))
'''
