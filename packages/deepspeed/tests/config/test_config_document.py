"""The page and the schema are made from the models, and the committed page is the current one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspeed.config import ConfigModel, json_schema
from deepspeed.config.__main__ import main
from deepspeed.config.document import config_page
from deepspeed.config.keys import known_keys

PAGE = Path(__file__).resolve().parents[4] / "docs" / "config.md"


def test_the_committed_page_is_current() -> None:
    if not PAGE.parent.is_dir():
        pytest.skip("not in the repository")
    assert PAGE.read_text(encoding="utf-8") == config_page(), "run: python -m deepspeed.config docs/config.md"


def test_every_key_is_on_the_page() -> None:
    page = config_page()
    for key in known_keys(ConfigModel):
        if key.section is None:
            assert f"| `{key.path.rpartition('.')[2]}` |" in page, key.path


def test_schema_has_keys_aliases_and_docs(tmp_path: Path) -> None:
    schema = json_schema()
    assert {"train_batch_size", "zero_optimization", "bfloat16"} <= schema["properties"].keys()
    zero = schema["$defs"]["ZeroSection"]
    assert zero["additionalProperties"] is False
    assert {"stage", "stage3_prefetch_bucket_size", "prefetch_bucket_size"} <= zero["properties"].keys()
    assert "sharded" in zero["properties"]["stage"]["description"]
    assert {"const": "auto"} in zero["properties"]["stage"]["anyOf"]
    target = tmp_path / "schema.json"
    main(target)
    assert json.loads(target.read_text()) == schema
