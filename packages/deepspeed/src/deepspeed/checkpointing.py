"""`import deepspeed.checkpointing`: the same module as `deepspeed.runtime.activation_checkpointing.checkpointing`."""

import sys

from deepspeed.runtime.activation_checkpointing import checkpointing

sys.modules[__name__] = checkpointing
