"""Input forms and unreadable inputs: each error names the file and the place."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path

import pytest

from deepspeed.config import choose_config, load_config
from deepspeed.config.jsonc import parse
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError

CONFIG = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_dict_is_kept_by_reference() -> None:
    loaded = load_config(CONFIG)
    assert loaded.raw is CONFIG
    assert loaded.origin == "config dict"


def test_path_as_str_and_as_path(file: Path) -> None:
    for form in (str(file), file):
        loaded = load_config(form)
        assert loaded.raw == CONFIG
        assert loaded.origin == f"file {file}"


def test_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8-sig")
    assert load_config(path).raw == CONFIG


@pytest.mark.parametrize("padding", ["=", ""])
def test_base64(padding: str) -> None:
    text = (
        base64.urlsafe_b64encode(json.dumps({**CONFIG, "x-note": "ÿþ?>~"}).encode()).decode().rstrip("=") + padding * 2
    )
    assert load_config(text).raw["zero_optimization"] == {"stage": 2}


def test_long_base64_is_no_path() -> None:
    text = base64.urlsafe_b64encode(json.dumps({"x-pad": "a" * 5000}).encode()).decode()
    assert load_config(text).raw == {"x-pad": "a" * 5000}


def test_json_text() -> None:
    assert load_config(' {"train_batch_size": 8,}').raw == {"train_batch_size": 8}


def test_comments_and_trailing_commas() -> None:
    text = """
    // line comment
    {
        "train_batch_size": 8, # hash comment
        /* block
           comment */
        "x-url": "http://a//b#c /* no comment */, ]",
        "x-quote": "\\"// still text\\"",
        "x-list": [1, 2, /* three, */],
    }
    """
    assert parse(text, "text") == {
        "train_batch_size": 8,
        "x-url": "http://a//b#c /* no comment */, ]",
        "x-quote": '"// still text"',
        "x-list": [1, 2],
    }


def test_repeated_keys_are_named_with_their_paths() -> None:
    with pytest.raises(DeepSpeedConfigError) as caught:
        parse('{"a": 1, "zero": {"stage": 1, "stage": 2, "o": [{"p": 1, "p": 2}]}, "a": 3}', "file ds.json")
    assert "Duplicate keys in DeepSpeed config: ['a', 'zero.stage', 'zero.o[0].p'] (file ds.json)" in str(caught.value)


def test_not_json_says_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{\n  "train_batch_size": 8,\n  "a" 1\n}')
    with pytest.raises(DeepSpeedConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert str(path) in text and "line 3, column 7" in text and '  "a" 1' in text


def test_column_is_that_of_the_file_with_comments() -> None:
    with pytest.raises(DeepSpeedConfigError, match="line 2, column 12"):
        parse("{ // one\n /* two */ oops }", "text")


@pytest.mark.parametrize("content", ["", "  \n", "// only a comment\n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.json"
    path.write_text(content)
    with pytest.raises(DeepSpeedConfigError, match=r"empty\.json is empty"):
        load_config(path)


@pytest.mark.parametrize(("content", "kind"), [("[1]", "list"), ('"x"', "str"), ("3", "int"), ("null", "NoneType")])
def test_not_an_object(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(DeepSpeedConfigError, match=f"holds a JSON {kind}; expected an object"):
        load_config(path)


def test_missing_file_folder_and_binary(tmp_path: Path) -> None:
    with pytest.raises(DeepSpeedConfigError, match=r"there is no file 'nowhere\.json'"):
        load_config("nowhere.json")
    with pytest.raises(DeepSpeedConfigError, match="is a folder"):
        load_config(tmp_path)
    binary = tmp_path / "model.bin"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DeepSpeedConfigError, match="not UTF-8 text"):
        load_config(binary)
    with pytest.raises(DeepSpeedConfigError, match="must be a dict, a path or a JSON string, not int"):
        load_config(3)  # type: ignore[arg-type]


def test_deep_nesting_is_an_error_of_ours() -> None:
    with pytest.raises(DeepSpeedConfigError):
        parse('{"a":' * 100_000, "text")


def test_the_config_comes_by_one_way_only(file: Path) -> None:
    args = argparse.Namespace(deepspeed_config=str(file))
    assert choose_config(None, args) == (str(file), "args.deepspeed_config")
    assert choose_config(None, None, CONFIG) == (CONFIG, "config_params")
    assert choose_config(None, argparse.Namespace(deepspeed_config=None, deepscale_config="old.json"))[0] == "old.json"
    with pytest.raises(AssertionError, match=r"config and args\.deepspeed_config"):
        choose_config(CONFIG, args)
    with pytest.raises(ConfigConflictError, match="no DeepSpeed config"):
        choose_config(None, argparse.Namespace())
