"""Upstream's path of the functions that make one fp32 model of a checkpoint, and of their command line.

python -m deepspeed.utils.zero_to_fp32 CHECKPOINT_DIR OUTPUT_DIR [-t TAG] [--safe_serialization]
"""

from __future__ import annotations

import sys

from deepspeed._lazy import explain_absent
from ds_zero.checkpoint.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
    main,
)

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
    "main",
]

explain_absent(__name__)

if __name__ == "__main__":
    sys.exit(main())
