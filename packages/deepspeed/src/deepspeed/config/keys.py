"""The tree of known keys: one walk over the models that the error texts, the support table's test, the docs page and
the schema share.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from deepspeed.config.base import Section

__all__ = ["ALIASES", "Key", "close_key", "inner_section", "known_keys", "section_at"]

ALIASES: dict[str, dict[str, str]] = {
    "": {"bfloat16": "bf16"},
    "zero_optimization": {
        **{
            name: f"stage3_{name}"
            for name in (
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
                "gather_16bit_weights_on_model_save",
                "module_granularity_threshold",
                "use_all_reduce_for_fetch_params",
                "allgather_sequential",
            )
        },
        "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    },
    "tensor_parallel": {"tp": "tensor_parallel", "kernel_inject": "replace_with_kernel_inject"},
}
"""Section -> other name -> the key it stands for. All but the fp16 one are equals; that one is deprecated upstream."""


@dataclass(frozen=True)
class Key:
    """One key of the config."""

    path: str
    """Dotted, from the top: "zero_optimization.stage"."""
    field: FieldInfo
    owner: type[Section]
    """The model that has the field."""
    section: type[Section] | None
    """The model of its value when the value is a block of keys."""


def inner_section(annotation: object) -> type[Section] | None:
    """The Section class that `annotation` is, or allows besides None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for arg in typing.get_args(annotation) if (found := inner_section(arg))), None)
    return None


def known_keys(model: type[Section], prefix: str = "") -> Iterator[Key]:
    """All keys below `model`, sections before their content, in the order of definition."""
    for name, field in model.model_fields.items():
        section = inner_section(field.annotation)
        yield Key(f"{prefix}{name}", field, model, section)
        if section is not None:
            yield from known_keys(section, f"{prefix}{name}.")


def section_at(model: type[Section], path: tuple[str, ...]) -> type[Section] | None:
    """The model that validates the block at `path`, None when there is no typed block there."""
    current: type[Section] | None = model
    for name in path:
        field = current.model_fields.get(name) if current is not None else None
        current = inner_section(field.annotation) if field is not None else None
    return current


def close_key(name: str, model: type[Section], path: str = "", cutoff: float = 0.6) -> str | None:
    """The key of `model` (or alias of section `path`) that `name` is most likely a misspelling of, None when nothing
    is near.
    """
    known = [*model.model_fields, *ALIASES.get(path, {})]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=cutoff)
    return near[0] if near else None
