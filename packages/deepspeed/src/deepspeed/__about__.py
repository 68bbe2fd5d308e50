"""The version of deepspeed: the one place it is written (pyproject.toml and the package read it from here)."""

__version__ = "0.20.0"
