"""The exceptions of the `deepspeed` package: few, and each is also a builtin so that existing `except` clauses keep
working.

    DeepSpeedConfigError (ValueError)      a config that cannot be used: unknown key, bad value, unreadable file,
    feature not supported yet
    └── ConfigConflictError (AssertionError too)   values that contradict each other (batch sizes, fp16 with bf16,
    two configs)

Upstream raised three kinds for a bad config: `DeepSpeedConfigError`, `ValueError` (pydantic, duplicate keys) and
`AssertionError` (batch sizes, precision). Whoever catches any of the three catches ours in the same situation: the
base class is a ValueError, and the situations that upstream asserted raise `ConfigConflictError`, which is an
AssertionError as well.
"""

from __future__ import annotations

__all__ = ["ConfigConflictError", "DeepSpeedConfigError"]


class DeepSpeedConfigError(ValueError):
    """The config cannot be used as it is. The text names each key by its full path, its value, what was expected,
    and what to do.
    """


class ConfigConflictError(DeepSpeedConfigError, AssertionError):
    """Config values contradict each other or the world they meet. The text shows every value involved and where it
    came from.

    Also an AssertionError, because upstream checked batch sizes, precision and double configs with `assert`.
    """
