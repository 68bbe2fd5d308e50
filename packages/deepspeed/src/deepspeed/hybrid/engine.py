"""`DeepSpeedHybridEngine`: a training engine whose model generates between steps (RLHF, distillation, self-play).

    engine.eval()                                  # a rollout begins: every parameter is gathered, once
    tokens = engine.generate(prompts, ...)         # as often as wanted, by ds-inference's decoder
    engine.train()                                 # everything that generation took is given back
    loss = engine(batch); engine.backward(loss); engine.step()

`module.generate` is the engine's for as long as the engine lives, so that code that calls the model's gets the same.
A *rollout* ends with `train()`, with the next forward in training mode, and with an optimizer step.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn

import ds_zero
from deepspeed.config import ResolvedConfig
from deepspeed.engine import DeepSpeedEngine
from deepspeed.errors import DeepSpeedConfigError
from deepspeed.events import Callback, EngineView
from deepspeed.hybrid.rollout import Rollout
from deepspeed.tensor_parallel import applied_to
from deepspeed.utils.logging import log_dist

__all__ = ["DeepSpeedHybridEngine"]


class DeepSpeedHybridEngine(DeepSpeedEngine):
    """Made by `deepspeed.initialize` with `hybrid_engine.enabled`.

    Attributes:
        rollout: what is gathered, read and held for generation now (`deepspeed.hybrid.rollout.Rollout`).
    """

    def __init__(self, model: nn.Module, config: ResolvedConfig, **arguments: Any) -> None:
        if applied_to(model) is not None:
            raise DeepSpeedConfigError(
                "hybrid_engine with a model that is split over tensor-parallel ranks is not supported: every rank"
                " generates with the whole gathered model; leave tensor_parallel out and let ZeRO-3 shard the model"
            )
        super().__init__(model, config, **arguments)
        self.rollout = Rollout(model, self.sharded, config.hybrid_engine)
        self._replaced = vars(model).get("generate")
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self.generate
        if isinstance(self.optimizer, ds_zero.ZeroOptimizer):
            self.optimizer.register_step_pre_hook(lambda *_: self.rollout.end())
        self.add_callback(_LatencyLog(self.rollout, config.steps_per_print))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ds_zero.ZeroStateError(
            f"copy.deepcopy of a {type(self.module).__name__} that generates by its hybrid engine; copy it before"
            " deepspeed.initialize, or load its gathered state dict into a new one"
        )

    # -- training and rollout --------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> DeepSpeedHybridEngine:
        """Training mode: ends a rollout. `train(False)`, that is `eval()`, begins one.

        Beginning is collective at stage 3 over transports that copy; on one host nothing is copied.
        """
        super().train(mode)
        if mode:
            self.rollout.end()
        else:
            self.rollout.begin()
        return self

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model; in training mode this ends a rollout."""
        if self.module.training:
            self.rollout.end()
        return super().forward(*inputs, **kwargs)

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's `generate` with its present weights, by the fused decoder where the model's type has one.

        The arguments and the result are transformers'. Outside of `eval()` the model generates as in eval mode, and the
        rollout that this begins lasts until training goes on. Nothing in here is collective once the rollout has begun:
        ranks may generate other lengths, other shapes, or nothing.

        Raises:
            RequestError (a ValueError): an empty prompt, or a mask of another shape.
            CapacityError (a RuntimeError): prompt and new tokens are more than `hybrid_engine.max_out_tokens`.
            AttributeError: the model generates nothing.
        """
        return self.rollout.generate(inputs, kwargs)

    # -- upstream's other verbs ------------------------------------------------------------------------------------

    def create_inference_module(self) -> None:
        """Begin a rollout and read the model now, which the first `generate` does otherwise."""
        self.rollout.read()

    def fuse_lora_weight(self) -> None:
        """Fuse low-rank adapters into copies of their layers' weights now; the first `generate` does it otherwise.

        The layers' own weights are not written: they have the same bits afterwards.
        """
        self.rollout.read()

    def unfuse_lora_weight(self) -> None:
        """Drop the fused copies; the next `generate` fuses the adapters as they are then."""
        self.rollout.forget()

    def unfuse_lora_weight_non_pinned(self) -> None:
        """As `unfuse_lora_weight`: there is one kind of memory."""
        self.rollout.forget()

    def retake_inference_cache(self) -> None:
        """Allocate keys and values again, as large as the last `generate` needed."""
        self.rollout.retake_cache()

    # -- what changes weights --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _outside_of_rollout(self) -> Iterator[None]:
        again = self.rollout.active
        self.rollout.end()
        try:
            yield
        finally:
            if again:
                self.rollout.begin()

    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As the training engine's; a rollout goes on with the loaded weights."""
        with self._outside_of_rollout():
            return super().load_checkpoint(load_dir, *args, **kwargs)

    def load_module_state_dict(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As the training engine's; a rollout goes on with the loaded weights."""
        with self._outside_of_rollout():
            super().load_module_state_dict(checkpoint, *args, **kwargs)

    def destroy(self) -> None:
        """End a rollout, give the model its own `generate` back, and what the training engine does."""
        self.rollout.end()
        attributes = vars(self.module)
        if attributes.get("generate") == self.generate:
            del attributes["generate"]
            if self._replaced is not None:
                attributes["generate"] = self._replaced
        super().destroy()


class _LatencyLog(Callback):
    """Where the seconds went, every `every` steps."""

    def __init__(self, rollout: Rollout, every: float | None) -> None:
        self._rollout, self._every, self._since = rollout, every, time.perf_counter()

    def after_step(self, engine: EngineView) -> None:
        if not self._every or engine.global_steps % self._every:
            return
        now = time.perf_counter()
        gathering, generating = self._rollout.take_seconds()
        total, self._since = now - self._since, now
        if generating:
            log_dist(
                f"hybrid engine, until step {engine.global_steps}: {total:.2f} s, of which gathering {gathering:.2f},"
                f" generating {generating:.2f}, training and the rest {total - gathering - generating:.2f}",
                ranks=[0],
            )
