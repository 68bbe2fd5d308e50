"""What ds-inference raises; each class is also the builtin that says as much.

ValueError
 +- ConfigError        a configuration that contradicts itself or cannot be read
 +- PlanError          weights that cannot be split over these ranks
 +- RequestError       a request or its sampling values that cannot be served
RuntimeError
 +- CapacityError      no room: the queue or the cache is full
 +- LogitsError        the model's output cannot be sampled from
OSError
 +- CheckpointError    a checkpoint that is missing, incomplete or broken
"""

from __future__ import annotations

__all__ = ["CapacityError", "CheckpointError", "ConfigError", "LogitsError", "PlanError", "RequestError"]


class ConfigError(ValueError):
    """A configuration that contradicts itself or cannot be read; the text names the key, or the file."""


class PlanError(ValueError):
    """Weights cannot be split over the ranks asked for; the text names the module, the sizes and what to change."""


class RequestError(ValueError):
    """A request cannot be served as it is: a bad sampling value, too long a prompt; the text gives value and limit."""


class CapacityError(RuntimeError):
    """There is no room now: the queue or the cache is full; the same request may succeed later."""


class LogitsError(RuntimeError):
    """Logits that no token can be drawn from (NaN, or every token excluded); the text names the row."""


class CheckpointError(OSError):
    """A checkpoint is missing, incomplete or broken; the text names the file or the tensor."""
