"""`import deepspeed.zero`: the same module as `deepspeed.runtime.zero`."""

import sys

from deepspeed.runtime import zero

sys.modules[__name__] = zero
