"""`import deepspeed.zero` and `from deepspeed.zero import Init`: the same module as the attribute `deepspeed.zero`."""

import sys

from deepspeed.runtime import zero

sys.modules[__name__] = zero
