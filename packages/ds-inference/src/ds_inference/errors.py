"""What ds-inference raises; each class is also the builtin that says as much.

ValueError
 +- ConfigError        a configuration that contradicts itself or cannot be read
 +- ModelError         a model that cannot be split, injected or quantised as asked
 +- RequestError       a request or its sampling values that cannot be served
RuntimeError
 +- CapacityError      no room: the queue or the cache is full
 +- LogitsError        the model's output cannot be sampled from
OSError
 +- CheckpointError    a checkpoint that is missing, incomplete or broken
"""

from __future__ import annotations

__all__ = ["CapacityError", "CheckpointError", "ConfigError", "LogitsError", "ModelError", "RequestError"]


class ConfigError(ValueError):
    """A configuration that contradicts itself or cannot be read; the text names the key, or the file."""


class ModelError(ValueError):
    """A model cannot be split, injected or quantised as asked; the text names the module, the misfit and what to do."""


class RequestError(ValueError):
    """A request cannot be served as it is: a bad sampling value, too long a prompt; the text gives value and limit."""


class CapacityError(RuntimeError):
    """There is no room now: the queue or the cache is full; the same request may succeed later."""


class LogitsError(RuntimeError):
    """Logits that no token can be drawn from (NaN, or every token excluded); the text names the row."""


class CheckpointError(OSError):
    """A checkpoint is missing, incomplete or broken; the text names the file or the tensor."""
