"""`python -m deepspeed.config` writes the shipped JSON Schema anew; with the name of a page, the page of all keys."""

from __future__ import annotations

import sys
from pathlib import Path

from deepspeed.config.document import SCHEMA_FILE, config_page, schema_text


def main(target: Path) -> None:
    """Write the schema to a `target` that ends in .json, the page to any other."""
    target.write_text(schema_text() if target.suffix == ".json" else config_page(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else SCHEMA_FILE)
