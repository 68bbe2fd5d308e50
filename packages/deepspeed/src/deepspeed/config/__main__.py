"""`python -m deepspeed.config PAGE.md` writes the page of all keys; with a name ending in .json, the JSON Schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deepspeed.config.document import config_page, json_schema


def main(target: Path) -> None:
    """Write the page, or the schema, to `target`."""
    text = json.dumps(json_schema(), indent=2) + "\n" if target.suffix == ".json" else config_page()
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
