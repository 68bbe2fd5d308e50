"""Pipeline parallelism for PyTorch with schedules as plain data.

This release holds the package's name and version only. Schedules (GPipe, 1F1B, interleaved, zero-bubble) as lists of
actions that are generated, validated, simulated and drawn without ranks, and the executor that runs them, come with
later releases.
"""

from __future__ import annotations

from ds_pipe.__about__ import __version__

__all__ = ["__version__"]
