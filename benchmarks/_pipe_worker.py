"""One rank of a pipeline benchmark: builds what it is asked for, and runs it step by step.

Speaks as `worker.py` does, under our interpreter as well as the peer's. One pair of ranks runs many contenders over the
same weights, by name: SCHEDULE@CUT, with a schedule of ds-pipe or `torch` (`torch.distributed.pipelining`'s 1F1B), and
a cut: `own` (by measured cost), `even` (the blocks in halves) or the number of blocks on the first stage. `engine` is
`deepspeed.initialize` with a `PipelineModule`, optimizer included, with its default split, or ours by measured cost.
Commands: `{"do": "step" | "timeline" | "compute" | "held", "name": NAME}`, `{"do": "plan"}`, `{"do": "exit"}`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import torch
from torch import Tensor, nn

LENGTH = 256
STAGES = 2
ADAMW = {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}

Pairs = list[tuple[Tensor, Tensor]]
Step = Callable[[Pairs], float]


def load(folder: Path) -> Any:
    """SmolLM2 in bf16, its head a copy of its embedding."""
    model: Any = models.load("smollm2", folder, "bf16")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model.train()


def micro_batches(folder: Path, step: int, num: int) -> Pairs:
    """Rows [1, length]; labels are not shifted."""
    tokens = torch.load(folder / "smollm2.tokens.pt", weights_only=True, mmap=True)
    start = step * num * LENGTH % (len(tokens) - num * LENGTH)
    rows = tokens[start : start + num * LENGTH].clone().view(num, 1, LENGTH)
    return [(row, row) for row in rows]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers has it."""
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), ignore_index=-100)


class Slice(nn.Module):
    """Some consecutive layers as one module from tensor to tensor: what a user of torch's pipelining writes."""

    def __init__(self, model: Any, start: int, stop: int, *, embeds: bool, ends: bool) -> None:
        super().__init__()
        self.embed = model.model.embed_tokens if embeds else None
        self.rotary = model.model.rotary_emb
        self.blocks = nn.ModuleList(model.model.layers[start:stop])
        self.norm = model.model.norm if ends else None
        self.head = model.lm_head if ends else None
        self._angles: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.embed is None else self.embed(inputs)
        if self._angles is None:
            self._angles = self.rotary(hidden, torch.arange(hidden.shape[1])[None])
        for block in self.blocks:
            hidden = block(hidden, position_embeddings=self._angles)
        if self.norm is None or self.head is None:
            return hidden
        return self.head(self.norm(hidden))


class Ours:
    """All contenders of one pair of ranks of this project."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import ds_comm
        import ds_pipe

        ds_comm.init_distributed()
        self.pipe, self.num = ds_pipe, spec["micro_batches"]
        self.model = load(Path(spec["folder"]))
        self.blocks = len(self.model.model.layers)
        self.layers = [layer.build() for layer in ds_pipe.split_causal_lm(self.model)]
        if spec["repeats"]:
            start = time.perf_counter()
            sample = micro_batches(Path(spec["folder"]), 0, 1)[0]
            self.costs = ds_pipe.profile_layers(self.layers, sample, ds_pipe.causal_lm_loss, repeats=spec["repeats"])
            self.profile_s = time.perf_counter() - start
        self.steps: dict[str, tuple[Step, Any]] = {}

    def parts(self, cut: str, num_chunks: int) -> tuple[int, ...]:
        """Bounds of the virtual stages; the layers are embedding, preparation, the blocks, norm, head."""
        if cut == "own":
            return self.pipe.balanced(self.costs.totals, STAGES * num_chunks)
        first = self.blocks // 2 if cut == "even" else int(cut)
        return (0, 2 + first, len(self.layers))

    def get(self, name: str) -> tuple[Step, Any]:
        """The contender's step, and its pipeline."""
        if name not in self.steps:
            schedule, _, cut = name.partition("@")
            self.steps[name] = self.torch(cut) if schedule == "torch" else self.ours(schedule, cut)
        return self.steps[name]

    def ours(self, schedule: str, cut: str) -> tuple[Step, Any]:
        plan = self.pipe.build(schedule, STAGES, self.num)
        parts = self.parts(cut, plan.num_chunks)
        # Weights for which this very split is the balanced one.
        weights = [1 / (stop - start) for start, stop in itertools.pairwise(parts) for _ in range(start, stop)]
        module = self.pipe.PipelineModule(
            self.layers,
            loss_fn=self.pipe.causal_lm_loss,
            partition_method="profile",
            layer_costs=weights,
            num_chunks=plan.num_chunks,
            placement="v" if schedule == "zb_v" else "loop",
        )
        assert module.parts == parts, (module.parts, parts)
        runner = self.pipe.pipeline(module, schedule=plan, num_micro_batches=self.num)
        return (lambda data: runner.train_batch(iter(data)).item()), runner

    def torch(self, cut: str) -> tuple[Step, Any]:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        rank = torch.distributed.get_rank()
        first = self.parts(cut, 1)[1] - 2
        bounds = (0, first) if rank == 0 else (first, self.blocks)
        module = Slice(self.model, *bounds, embeds=rank == 0, ends=rank == 1)
        stage = PipelineStage(module, rank, STAGES, torch.device("cpu"))
        schedule = Schedule1F1B(stage, n_microbatches=self.num, loss_fn=next_token_loss)

        def step(data: Pairs) -> float:
            rows = torch.cat([inputs for inputs, _ in data])
            if rank == 0:
                schedule.step(rows)
                return 0.0
            losses: list[Tensor] = []
            schedule.step(target=rows, losses=losses)
            return float(torch.stack(losses).mean())

        return step, module

    def step(self, name: str, data: Pairs) -> float:
        return self.get(name)[0](data)

    @property
    def gradients_mb(self) -> float:
        """What the last step left in `.grad`."""
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None) / 1e6

    def after(self) -> None:
        """Leave no gradient, outside of the time that counts."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def timeline(self, name: str, data: Pairs) -> dict[str, Any]:
        """Every action of one step on the clock that all processes share."""
        spans: list[tuple[str, float, float]] = []
        _, runner = self.get(name)
        runner.observers.append(lambda action, start, end: spans.append((str(action), start, end)))
        start = time.perf_counter()
        self.step(name, data)
        seconds = time.perf_counter() - start
        runner.observers.clear()
        return {"spans": spans, "seconds": seconds}

    def held(self, name: str, data: Pairs) -> dict[str, Any]:
        """Per stage, the bytes that activations hold at most in a step, counted storage by storage."""
        found = self.pipe.measure_memory(self.get(name)[1], iter(data))
        return {"peak_mb": [nbytes / 1e6 for nbytes in found.peak]}

    def compute(self, name: str, data: Pairs) -> dict[str, Any]:
        """Seconds of this stage's forwards and backwards without any communication, on made-up inputs."""
        _, runner = self.get(name)
        first, last = runner.is_first_stage, runner.is_last_stage
        inputs = data[0][0]
        if not first:
            with torch.no_grad():
                given = inputs
                for layer in self.layers[: runner.model.parts[runner.stage_id]]:
                    given = layer(given)
        start = time.perf_counter()
        for tokens, labels in data:
            fed = tokens if first else with_hidden(given, hidden_of(given).detach().requires_grad_())
            outputs = runner.model(fed)
            if last:
                (self.pipe.causal_lm_loss(outputs, labels) / len(data)).backward()
            else:
                hidden_of(outputs).backward(torch.ones_like(hidden_of(outputs)))
        return {"seconds": time.perf_counter() - start}

    def plan(self) -> dict[str, Any]:
        """What was measured, and what follows from it."""
        found: dict[str, Any] = {"profile_s": self.profile_s, "totals": list(self.costs.totals)}
        for schedule in ("1f1b", "zb_h1", "zb_v"):
            plan = self.pipe.build(schedule, STAGES, self.num)
            parts = self.parts("own", plan.num_chunks)
            simulated = self.pipe.simulate(plan, self.costs.merge(parts))
            found[schedule] = {
                "parts": parts,
                "simulated_s": simulated.makespan,
                "activation_mb": [nbytes / 1e6 for nbytes in simulated.peak_activation],
            }
        return found


class Peer:
    """`deepspeed.initialize` with a PipelineModule: upstream's, or ours in its place."""

    gradients_mb = 0.0  # it clears them before a step ends

    def __init__(self, spec: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.pipe import PipelineModule

        deepspeed.init_distributed("gloo")
        model = load(Path(spec["folder"]))
        count = len(model.model.layers)
        layers: list[nn.Module] = [Slice(model, 0, 0, embeds=True, ends=False)]
        layers += [Slice(model, index, index + 1, embeds=False, ends=False) for index in range(count)]
        layers.append(Slice(model, 0, 0, embeds=False, ends=True))
        options: dict[str, Any] = {}
        if spec.get("measured"):  # ours only: upstream has no such split
            sample = micro_batches(Path(spec["folder"]), 0, 1)[0]
            options = {"partition_method": "profile", "profile_sample": sample}
        module = PipelineModule(layers, num_stages=STAGES, loss_fn=next_token_loss, **options)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": spec["micro_batches"],
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": ADAMW},
            "steps_per_print": 1000000,
        }
        if "schedule" in spec:
            config["pipeline"] = {"schedule": spec["schedule"]}
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.engine = deepspeed.initialize(model=module, model_parameters=parameters, config=config)[0]
        self.split = [int(bound) for bound in module.parts]

    def step(self, name: str, data: Pairs) -> float:
        return float(self.engine.train_batch(data_iter=iter(data)))

    def after(self) -> None:
        """The engine clears its gradients by itself."""

    def plan(self) -> dict[str, Any]:
        return {"parts": self.split}


def hidden_of(state: Any) -> Any:
    """The hidden states in what goes between layers: after the norm they are all of it."""
    return state["hidden"] if isinstance(state, dict) else state


def with_hidden(state: Any, hidden: Tensor) -> Any:
    """The same with other hidden states."""
    return {**state, "hidden": hidden} if isinstance(state, dict) else hidden


def resident_mb(peak: bool = False) -> float:
    """Memory of this process, now or at most since the last reset."""
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def commands(spec: dict[str, Any], runner: Any) -> Iterator[dict[str, Any]]:
    """Answers to what comes on stdin."""
    folder, cursor = Path(spec["folder"]), 0
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "exit":
            return
        if command["do"] == "plan":
            yield runner.plan()
            continue
        data = micro_batches(folder, cursor, spec["micro_batches"])
        cursor += 1
        if command["do"] != "step":
            torch.distributed.barrier()
            answer = getattr(runner, command["do"])(command["name"], data)
            runner.after()
            yield answer
            continue
        before = resident_mb()
        Path("/proc/self/clear_refs").write_text("5")
        torch.distributed.barrier()
        start = time.perf_counter()
        loss = runner.step(command["name"], data)
        seconds = time.perf_counter() - start
        peak = resident_mb(peak=True)
        yield {
            "seconds": seconds,
            "loss": loss,
            "before_mb": before,
            "peak_mb": peak,
            "gradients_mb": runner.gradients_mb,
        }
        runner.after()


def main() -> None:
    """Build, answer "ready", then run commands."""
    reply = os.fdopen(int(os.environ["DS_BENCH_REPLY_FD"]), "w")

    def answer(value: dict[str, Any]) -> None:
        reply.write(json.dumps(value) + "\n")
        reply.flush()

    try:
        torch.set_num_threads(1)
        spec = json.loads(os.environ["DS_BENCH_SPEC"])
        runner = (Peer if spec["kind"] == "engine" else Ours)(spec)
        answer({"torch": torch.__version__})
        for found in commands(spec, runner):
            answer(found)
    except BaseException:
        answer({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
