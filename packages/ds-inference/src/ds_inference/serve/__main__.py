"""`python -m ds_inference.serve MODEL` is `ds-serve MODEL`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Serve, or say what is missing for it."""
    try:
        from ds_inference.serve.server.run import main as serve
    except ModuleNotFoundError as error:
        if error.name in ("starlette", "uvicorn", "prometheus_client"):
            sys.exit(f"ds-serve needs {error.name}: pip install 'ds-inference[serve]'")
        raise
    serve()


if __name__ == "__main__":
    main()
