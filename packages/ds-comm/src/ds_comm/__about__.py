"""The version of ds-comm: the one place it is written (pyproject.toml and the package read it from here)."""

__version__ = "0.1.0"
