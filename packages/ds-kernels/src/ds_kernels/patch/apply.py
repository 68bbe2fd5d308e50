"""`apply_kernels(model)`: put kernels into the modules of a Hugging Face model in place; `undo` takes them out.

A module is patched by a `forward` of its own (an instance attribute): its class, parameters, names, hooks and
state_dict stay, other models of the same class are not touched. A deep copy of a patched model is patched; a pickle
of it loads as the model without patches.
What a family's rules do not know is left alone and named in the report.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from ds_kernels.errors import KernelArgumentError, PatchError
from ds_kernels.patch.losses import head_forward
from ds_kernels.patch.rules import Family, Rule, has_own_forward

__all__ = ["FAMILIES", "KERNELS", "Applied", "apply_kernels"]

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "bert")
KERNELS = ("norm", "mlp", "rope", "attention", "loss")


@dataclasses.dataclass
class Applied:
    """What was replaced in a model, and the way back.

    Attributes:
        model: the model, the same object.
        replaced: kernel -> names of the modules that have it now.
        skipped: module name -> why a module that was known was left alone.
    """

    model: nn.Module
    replaced: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    _patches: list[tuple[str, Any, Callable[..., Any]]] = dataclasses.field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every module its own forward back.

        Raises:
            PatchError: a module's forward was replaced once more since (nothing is changed then), or undone already.
        """
        if not self._patches:
            raise PatchError("undo: nothing is applied here any more")
        for name, module, forward in self._patches:
            if vars(module).get("forward") is not forward:
                raise PatchError(
                    f"undo: the forward of {name or 'the model'!r} is no longer the one that apply_kernels put there; "
                    "take off what was put on it since, then undo"
                )
        for _, module, _ in self._patches:
            del module.forward
        self._patches.clear()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        parts = [f"{kernel} in {len(names)} modules" for kernel, names in self.replaced.items()]
        reasons = sorted(set(self.skipped.values()))
        left = f"; {len(self.skipped)} left alone ({'; '.join(reasons)})" if reasons else ""
        return f"{type(self.model).__name__}: {', '.join(parts) or 'nothing replaced'}{left}"

    def _put(self, name: str, module: Any, forward: Callable[..., Any]) -> None:
        bound = types.MethodType(forward, module)
        module.forward = bound
        self._patches.append((name, module, bound))


def apply_kernels(model: nn.Module, *, only: Collection[str] = KERNELS) -> Applied:
    """Replace what is known in a Hugging Face model by this package's kernels, in place.

    Known are the norms, gated MLPs, rotary embeddings, attention and language-model losses of Llama (and what uses its
    classes, such as SmolLM), Qwen2, Qwen3, Mistral and Gemma; activation, attention and loss of GPT-2; the masked loss
    of BERT. Attention is replaced where the model's implementation is "sdpa", for calls without mask and dropout.
    Results stay within the rounding of the model's dtype: an fp32 model's to about 1e-6 of their size; in 16 bits some
    intermediate roundings are left out.

    A training step (`model.training` and `labels` given) returns `logits=None`: the fused loss never has them. Leave
    "loss" out of `only` where a trainer reads the logits while training. In evaluation everything is as before.

    Args:
        model: a model, or any module that holds parts of one.
        only: which kernels: "norm", "mlp", "rope", "attention", "loss".

    Returns:
        What was replaced, what was not and why; `undo()` restores the model, and so does leaving it as a context.

    Raises:
        KernelArgumentError: an unknown name in `only`.
        PatchError: no module of a known family in the model, or kernels are applied to it already.
    """
    unknown = sorted(set(only) - set(KERNELS))
    if unknown:
        raise KernelArgumentError(f"apply_kernels: only holds {unknown[0]!r}; known are {', '.join(KERNELS)}")
    found = list(_matches(model))
    if not found:
        raise PatchError(
            f"apply_kernels: no module of {type(model).__name__} is of a known class; known are those of "
            f"{', '.join(FAMILIES)} in transformers"
        )
    for name, module, _ in found:
        if _is_ours(vars(module).get("forward")):
            raise PatchError(f"apply_kernels: applied to {name or 'the model'!r} already; undo that first")
    applied = Applied(model)
    for name, module, rules in found:
        _apply(applied, name, module, [rule for rule in rules if rule.kernel in only])
    return applied


def _apply(applied: Applied, name: str, module: Any, rules: list[Rule]) -> None:
    """Apply those of a module's rules that fit it."""
    fitting = []
    for rule in rules:
        reason = "it has a forward of its own" if has_own_forward(module) else rule.unfit(module)
        if reason is None:
            fitting.append(rule)
        else:
            applied.skipped[name] = reason
    if not fitting:
        return
    forward = type(module).forward
    for rule in fitting:
        forward = rule.make(module, forward)
        applied.replaced.setdefault(rule.kernel, []).append(name)
    applied._put(name, module, forward)
    if any(rule.kernel == "loss" for rule in fitting):
        applied._put(f"{name}.head", module.get_output_embeddings(), head_forward)


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "__module__", "").startswith(__package__ or "ds_kernels.patch")


def _matches(model: nn.Module) -> list[tuple[str, Any, list[Rule]]]:
    """`(name, module, rules)` of every module that a family knows; family files are imported only if needed."""
    found: list[tuple[str, Any, list[Rule]]] = []
    for name, module in model.named_modules():
        package, _, rest = type(module).__module__.partition("transformers.models.")
        family = rest.partition(".")[0]
        if package or family not in FAMILIES:
            continue
        known: Family = importlib.import_module(f"ds_kernels.patch.families.{family}").FAMILY
        rules = known.rules_for(module)
        if rules:
            found.append((name, module, rules))
    return found
