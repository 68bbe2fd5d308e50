"""Documentation made from the models and the support table: the page docs/config.md and a JSON Schema for editors.

`python -m deepspeed.config docs/config.md` rewrites the page, `python -m deepspeed.config` the shipped schema; tests
hold the committed ones against them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.config.base import Section, dtype_spellings
from deepspeed.config.keys import ALIASES, Key, known_keys
from deepspeed.config.model import ConfigModel
from deepspeed.config.support import support_of

__all__ = ["SCHEMA_FILE", "config_page", "field_docs", "json_schema", "schema_text"]

SCHEMA_FILE = Path(__file__).with_name("schema.json")
"""The JSON Schema as it is shipped: what `schema_text` gave when the models were last changed."""

_HEAD = """# The config, key by key

<!-- Made by `python -m deepspeed.config docs/config.md` from the models and the support table: change
those, not this page. -->

`deepspeed.initialize(config=...)` takes a dict, the path of a JSON file (comments and trailing commas are fine), or
base64 of JSON; `--deepspeed_config FILE` does the same from the command line. Unknown keys inside a section are
errors that name the nearest key. At the top level a key close to a known one is an error as well; any other is a
warning, and none if its name starts with `x-`. `"auto"` means "as if the key were not there".

Status of a key:

- **works**: it does what it says.
- **no-op**: accepted and ignored, for the reason given; the log says so once.
- **unsupported**: refused by name while the feature is on; a disabled block is accepted.
"""


@functools.cache
def field_docs(section: type[Section]) -> dict[str, str]:
    """Field -> the text under it, for the fields that `section` itself defines.

    Read from the source when a page or a schema is made: pydantic can do it for each class as it is defined, which
    would cost every `import deepspeed.config` a quarter of a second.
    """
    tree = ast.parse(inspect.getsource(section))
    (node,) = tree.body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: _oneline(text.value.value)
        for field, text in itertools.pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def config_page() -> str:
    """The Markdown page: one table per section."""
    keys = list(known_keys(ConfigModel))
    lines = [_HEAD, "## Top level", "", *_table([key for key in keys if "." not in key.path and key.section is None])]
    for section in (key for key in keys if key.section is not None):
        own = [key for key in keys if key.path.rpartition(".")[0] == section.path and key.section is None]
        if own:
            lines += [
                "",
                f"## {section.path}",
                "",
                _oneline(section.section.__doc__ if section.section else ""),
                "",
                *_table(own),
            ]
    lines += ["", "## Other names", "", "| Name | Stands for |", "|---|---|", *_aliases()]
    return "\n".join(lines) + "\n"


def _table(keys: list[Key]) -> Iterator[str]:
    yield "| Key | Type | Default | Status | Meaning |"
    yield "|---|---|---|---|---|"
    for key in keys:
        entry = support_of(key.path)
        status = entry.status + (f": {entry.note}" if entry.note else "")
        cells = (
            f"`{key.path.rpartition('.')[2]}`",
            _type(key.field.annotation),
            _default(key),
            status,
            field_docs(key.owner)[key.path.rpartition(".")[2]],
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _aliases() -> Iterator[str]:
    for section, names in ALIASES.items():
        for alias, key in names.items():
            yield f"| `{section + '.' if section else ''}{alias}` | `{key}` |"
    yield '| `"zero_optimization": true` | stage 1, with the top-level `allgather_size` (deprecated) |'
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        yield f'| `zero_optimization.{old}` | `{new}: {{"device": "cpu"}}` (deprecated) |'


def _default(key: Key) -> str:
    if key.field.is_required():
        return "required"
    value = key.field.get_default(call_default_factory=True)
    if value == sys.maxsize:
        return "no limit"
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, tuple) and value and all("." in str(item) for item in value):
        return ", ".join(f"`{str(item).rpartition('.')[2]}`" for item in value)
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f'"{arg}"' for arg in args)
    if origin is typing.Annotated:
        return _type(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return "block"
    names = {bool: "bool", int: "int", float: "number", str: "text"}
    return names.get(annotation, "block" if isinstance(annotation, type) and issubclass(annotation, Section) else "any")


def _oneline(text: str | None) -> str:
    return " ".join((text or "").split())


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
"""pydantic leaves bounds behind a validator under its own names."""


def json_schema() -> dict[str, Any]:
    """A JSON Schema of the config file, for editors: set `"$schema"` to where it was written.

    What `normalize` understands is allowed: "auto", other names of keys, the deprecated forms, every spelling of a
    dtype.
    """
    schema: dict[str, Any] = _standard(ConfigModel.model_json_schema())
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "DeepSpeed config"
    schema["additionalProperties"] = True  # clients send extras at the top level; they are warned about
    schema["properties"]["$schema"] = {"type": "string", "description": "Where this schema is."}
    definitions = schema.get("$defs", {})
    models: dict[str, type[Section]] = {
        key.section.__name__: key.section for key in known_keys(ConfigModel) if key.section is not None
    }
    blocks: list[tuple[dict[str, Any], type[Section]]] = [(schema, ConfigModel)]
    for block, model in [*blocks, *((definitions[name], model) for name, model in models.items())]:
        for name in model.model_fields:
            field = block["properties"][name]
            block["properties"][name] = {"anyOf": [field, {"const": "auto"}], "description": field_docs(model)[name]}
    for section, names in ALIASES.items():
        owner = schema if not section else definitions[_model_name(section)]
        for alias, key in names.items():
            owner["properties"][alias] = {**owner["properties"][key], "description": f"Another name of {key}."}
    zero = definitions[_model_name("zero_optimization")]["properties"]
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        zero[old] = {"type": "boolean", "deprecated": True, "description": f"Deprecated: {new}."}
    whole = schema["properties"]["zero_optimization"]
    whole["anyOf"].append({"type": "boolean", "deprecated": True, "description": 'Deprecated: {"stage": 1}.'})
    return schema


def _standard(node: Any) -> Any:
    """pydantic's schema in standard words, without its titles, and with all spellings of a dtype."""
    if isinstance(node, list):
        return [_standard(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {_BOUNDS.get(key, key): _standard(value) for key, value in node.items() if not _is_title(key, value)}
    names = made.get("enum")
    if isinstance(names, list) and {"fp32", "bf16", "fp16"} <= set(names):
        spellings = [spelling for name in names for spelling in dtype_spellings(name)]
        made["enum"] = [*names, *(text for text in spellings if text not in names)]
    return made


def _is_title(key: str, value: Any) -> bool:
    return key == "title" and isinstance(value, str)


def schema_text() -> str:
    """The text of the schema's file."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _model_name(section: str) -> str:
    return next(
        key.section.__name__ for key in known_keys(ConfigModel) if key.path == section and key.section is not None
    )
