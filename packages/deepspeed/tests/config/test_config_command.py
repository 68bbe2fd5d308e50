"""`deepspeed config`: where each value of a file came from, and the shipped JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspeed import cli
from deepspeed.config import json_schema
from deepspeed.config.document import SCHEMA_FILE, schema_text
from deepspeed.config.explain import Row, explain_file
from deepspeed.config.lines import key_lines
from deepspeed.errors import DeepSpeedConfigError

TEXT = """{
  "$schema": "schema.json",
  "train_batch_size": 32, /* a comment
     of two lines */
  "bfloat16": {"enabled": true}, // an alias
  "zero_optimization": {
    "stage": 3,
    "prefetch_bucket_size": "auto",
    "overlap_comm": "auto",
    "cpu_offload": true,
    "zero_quantized_weights": false
  },
  "prescale_gradients": true,
  "gradient_accumulation_steps": "auto",
}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(TEXT)
    return path


def rows(path: Path, **arguments: object) -> dict[str, Row]:
    return {row.key: row for row in explain_file(path, **arguments).rows}  # type: ignore[arg-type]


def test_lines_of_keys() -> None:
    text = '{"a": 1,\n # note "b": 2\n "b": {"c": [{"d": "x: {"},\n {"d": [1,\n 2]}], "e,\\"f":\n 3}}'
    assert key_lines(text) == {"a": 1, "b": 3, "b.c": 3, "b.c[0].d": 3, "b.c[1].d": 4, 'b.e,\\"f': 5}


def test_every_origin_is_told(file: Path) -> None:
    found = rows(file, world=4, environment={})
    assert (found["train_batch_size"].origin, found["train_batch_size"].line) == ("file", 3)
    assert found["train_micro_batch_size_per_gpu"].value == 8
    assert found["train_micro_batch_size_per_gpu"].origin == "derived"
    alias = found["bf16.enabled"]
    assert (alias.origin, alias.line, alias.note) == ("file", 5, "another name of bf16.enabled")
    prefetch = found["zero_optimization.stage3_prefetch_bucket_size"]
    assert (prefetch.origin, prefetch.line, prefetch.source) == ("auto", 8, 'line 8 says "auto"; default')
    overlap = found["zero_optimization.overlap_comm"]
    assert (overlap.origin, overlap.line) == ("auto", 9) and "derived" in overlap.source
    offload = found["zero_optimization.offload_optimizer.device"]
    assert (offload.value, offload.line) == ("cpu", 10) and "cpu_offload" in offload.source
    assert found["prescale_gradients"].note.startswith("no effect: ")
    assert found["steps_per_print"].origin == "default"


def test_the_number_of_ranks_has_an_origin_too(file: Path) -> None:
    def ranks(world: int | None, environment: dict[str, str]) -> tuple[object, str]:
        row = rows(file, world=world, environment=environment)["(data-parallel ranks)"]
        return row.value, row.origin

    assert ranks(4, {"WORLD_SIZE": "2"}) == (4, "argument")
    assert ranks(None, {"WORLD_SIZE": "2"}) == (2, "environment")
    assert ranks(None, {}) == (1, "default")
    with pytest.raises(DeepSpeedConfigError, match="WORLD_SIZE is 'two'"):
        ranks(None, {"WORLD_SIZE": "two"})


def test_the_command_prints_what_was_chosen(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "explain", str(file), "--world", "4"]) == 0
    chosen = capsys.readouterr().out
    assert "line 7: zero_optimization.stage" in chosen and "steps_per_print" not in chosen
    assert "note: zero_optimization.cpu_offload is deprecated" in chosen
    assert cli.main(["config", "explain", str(file), "--world", "4", "--all"]) == 0
    assert "steps_per_print" in capsys.readouterr().out
    assert cli.main(["config", "explain", str(file), "--world", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["data_parallel_ranks"] == 4
    assert {"key", "value", "origin", "source", "line", "note"} == document["keys"][0].keys()


def test_a_bad_file_is_an_exit_code_and_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"train_batch_size": 3, "zero_optimization": {"stagee": 1}}')
    assert cli.main(["config", "explain", str(path)]) == 2
    assert "did you mean stage?" in capsys.readouterr().err
    assert cli.main(["config", "explain", str(tmp_path / "none.json")]) == 2


def test_the_shipped_schema_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run: python -m deepspeed.config"
    assert cli.main(["config", "schema", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == json_schema()
    assert cli.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_schema_uses_standard_words_and_knows_what_is_understood() -> None:
    text = schema_text()
    assert not any(f'"{word}": ' in text for word in ("ge", "gt", "le", "lt"))
    zero = json_schema()["$defs"]["ZeroSection"]["properties"]
    assert zero["sub_group_size"]["anyOf"][0]["exclusiveMinimum"] == 0
    assert {"cpu_offload", "cpu_offload_param"} <= zero.keys()
    dtype = json_schema()["properties"]["communication_data_type"]["anyOf"][0]["anyOf"][0]
    assert {"bf16", "bfloat16", "torch.bfloat16"} <= set(dtype["enum"])


@pytest.mark.parametrize(
    ("config", "good"),
    [
        ({"train_batch_size": "auto", "zero_optimization": {"stage": 3, "prefetch_bucket_size": 5e8}}, True),
        ({"zero_optimization": True, "bfloat16": {"enabled": True}, "foreign": 1}, True),
        ({"zero_optimization": {"stage": "three"}}, False),
        ({"zero_optimization": {"stagee": 1}}, False),
        ({"train_batch_size": 0}, False),
        ({"communication_data_type": "half"}, True),
        ({"communication_data_type": "quarter"}, False),
    ],
)
def test_editors_judge_as_we_do(config: dict[str, object], good: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="validates as an editor would")
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(config) == good
