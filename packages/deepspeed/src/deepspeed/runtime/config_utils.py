"""Upstream's path of config helpers: the base class of typed sections and small functions around JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deepspeed._lazy import explain_absent
from deepspeed.config.base import Section
from deepspeed.config.normalize import normalize
from deepspeed.errors import DeepSpeedConfigError

__all__ = [
    "DeepSpeedConfigModel",
    "ScientificNotationEncoder",
    "dict_raise_error_on_duplicate_keys",
    "get_config_default",
    "get_scalar_param",
    "pp_int",
]


class DeepSpeedConfigModel(Section):
    """Base of typed config sections, upstream's name: unknown keys are errors, values of "auto" are dropped before
    validation.

    `strict=True` keeps "auto" values, which then fail unless the field takes them.
    """

    def __init__(self, strict: bool = False, **data: Any) -> None:
        super().__init__(**(data if strict else normalize(data).data))


def get_config_default(config: type[Section], field_name: str) -> Any:
    """The default of a field. DeepSpeedConfigError when the section has no such field or the field is required."""
    field = config.model_fields.get(field_name)
    if field is None or field.is_required():
        what = "is required and has no default" if field is not None else "is no field of it"
        raise DeepSpeedConfigError(f"{config.__name__}.{field_name}: {what}")
    return field.get_default(call_default_factory=True)


def get_scalar_param(param_dict: Mapping[str, Any], param_name: str, param_default_value: Any) -> Any:
    """`param_dict[param_name]`, or the default."""
    return param_dict.get(param_name, param_default_value)


def dict_raise_error_on_duplicate_keys(ordered_pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for json that refuses repeated keys with a ValueError."""
    made = dict(ordered_pairs)
    if len(made) != len(ordered_pairs):
        keys = [key for key, _ in ordered_pairs]
        raise DeepSpeedConfigError(
            f"Duplicate keys in DeepSpeed config: {[key for key in made if keys.count(key) > 1]}"
        )
    return made


class pp_int(int):
    """An int that prints with thousands separators, or as the text it was given."""

    custom_print_str: str | None

    def __new__(cls, val: int, custom_print_str: str | None = None) -> pp_int:
        made = super().__new__(cls, val)
        made.custom_print_str = custom_print_str
        return made

    def __repr__(self) -> str:
        return self.custom_print_str or f"{int(self):,}"


class ScientificNotationEncoder(json.JSONEncoder):
    """Indented JSON in which numbers above 1000 are in scientific notation."""

    def iterencode(self, o: Any, _one_shot: bool = False) -> Any:
        """The whole text as one chunk."""
        return iter([self._text(o, 0)])

    def encode(self, o: Any) -> str:
        """The text of `o`."""
        return self._text(o, 0)

    def _text(self, value: Any, level: int) -> str:
        pad, end = " " * (level + 4), " " * level
        if isinstance(value, bool) or value is None:
            return json.dumps(value)
        if isinstance(value, (int, float)):
            return f"{value:e}" if 1e3 < value < float("inf") else json.dumps(value)
        if isinstance(value, Mapping):
            rows = [f"{pad}{json.dumps(str(key))}: {self._text(item, level + 4)}" for key, item in value.items()]
            return "{\n" + ",\n".join(rows) + f"\n{end}}}" if rows else "{}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(self._text(item, level + 4) for item in value) + "]"
        return json.dumps(value, default=str)


explain_absent(__name__)
