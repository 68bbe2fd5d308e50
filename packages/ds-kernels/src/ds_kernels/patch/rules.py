"""What a family's module says: classes of Hugging Face transformers and the forward methods that take their place.

A *rule* names a class of the family's modeling file, the operation it gains, the new forward (a function of the module
and forward's arguments; the module keeps its parameters, names and hooks), and what must hold of an instance for the
new forward to compute the same. Only exactly these classes match, no subclasses: what a user overrode stays.

transformers itself is never imported here: a class is known by its module's and its own name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Family", "Rule", "always", "has_own_forward"]


def always(_module: Any) -> str | None:
    """No condition."""
    return None


def has_own_forward(module: Any) -> bool:
    """Whether an instance's forward is another than its class's (a pickle makes an attribute of the latter)."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", own) is not type(module).forward


@dataclasses.dataclass(frozen=True)
class Rule:
    """One class and what takes the place of its forward; several rules for one class apply one after the other.

    Attributes:
        kernel: what it is called in reports and in `only`: "norm", "mlp", "rope", "attention", "loss".
        class_name: of the module, in the family's modeling file.
        make: `(module, forward) -> forward`: this module's new method, unbound, from the one it has so far.
        unfit: `(module) -> why not`, None if the new forward fits.
    """

    kernel: str
    class_name: str
    make: Callable[[Any, Callable[..., Any]], Callable[..., Any]]
    unfit: Callable[[Any], str | None] = always


@dataclasses.dataclass(frozen=True)
class Family:
    """The rules for one modeling file, `transformers.models.<name>.modeling_<name>`."""

    name: str
    rules: Sequence[Rule]

    def rules_for(self, module: Any) -> list[Rule]:
        """The rules of a module's class; none for a class that is not known."""
        kind = type(module)
        if kind.__module__ != f"transformers.models.{self.name}.modeling_{self.name}":
            return []
        return [rule for rule in self.rules if rule.class_name == kind.__name__]
