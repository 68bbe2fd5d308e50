"""What every config section is made of: the closed, frozen pydantic base and the value types that several sections
share.

Invariants
- A `Section` refuses unknown keys and cannot be changed after validation; the text under a field is its
  documentation (docs page and JSON Schema).
- Field names are upstream's JSON keys. Aliases, deprecated keys and "auto" never get here: `normalize` has
  translated them.
- Integral floats (5e8) become ints; a bool is never a number; dtype spellings become one of "fp32", "bf16", "fp16",
  "int8".
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "Count",
    "DtypeName",
    "FloatDtype",
    "Fraction",
    "FreeForm",
    "Integer",
    "Interval",
    "NonNegative",
    "PathText",
    "Positive",
    "Real",
    "Section",
    "dtype_name",
    "dtype_spellings",
]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, instances are immutable, field docs are the strings under the
    fields.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
    )


_SPELLINGS: dict[str, str] = {
    **dict.fromkeys(("fp32", "float32", "float"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "bfloat"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half"), "fp16"),
    "int8": "int8",
}


def dtype_name(value: Any) -> Any:
    """The short name of a dtype given as text ("bfloat16", "torch.half", ...) or torch.dtype; anything unknown is
    returned as it came.
    """
    text = str(value)
    return _SPELLINGS.get(text.removeprefix("torch."), value) if value is not None else None


def dtype_spellings(name: str) -> list[str]:
    """Every text that stands for the dtype of a short name, the short name itself included."""
    plain = [text for text, short in _SPELLINGS.items() if short == name]
    return [*plain, *(f"torch.{text}" for text in plain)]


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not a boolean")
    return value


def _whole_as_int(value: float) -> float:
    return int(value) if value.is_integer() else value


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Integer = Annotated[int, BeforeValidator(_not_bool)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_not_bool), Field(gt=0)]
Real = Annotated[float, BeforeValidator(_not_bool)]
NonNegative = Annotated[float, BeforeValidator(_not_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, le=1)]
Interval = Annotated[float, AllowInfNan(True), BeforeValidator(_not_bool), Field(ge=0), AfterValidator(_whole_as_int)]
"""A number of steps that may be infinite (never)."""
PathText = Annotated[str, BeforeValidator(_path_text)]
FreeForm = dict[str, Any]
"""A block whose contents are not checked here: parameters of a class chosen by name, or a feature that is only
recognised to be refused.
"""

FloatDtype = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(dtype_name)]
DtypeName = Annotated[Literal["fp32", "bf16", "fp16", "int8"], BeforeValidator(dtype_name)]
