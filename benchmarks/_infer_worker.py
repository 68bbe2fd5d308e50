"""One inference contender in a process of its own: builds it, then obeys its parent (`_ranks.RankGroup`).

The specification comes as JSON in `DS_BENCH_SPEC`, commands as JSON lines on stdin, answers go to the file descriptor
`DS_BENCH_REPLY_FD`. Commands: `{"do": "generate", "prompts": [[token, ...], ...], "new": n}` (greedy, the end of text
ignored; answers seconds and tokens), `{"do": "perplexity", ...}`, `{"do": "serve", ...}`, `{"do": "exit"}`.

Families, all greedy, without an end-of-text token:
- `transformers`: `generate`, eager. `compiled`: `generate` with a static cache and its own `torch.compile`.
- `upstream`, `ours`: `init_inference(model, ...)`, then `generate`. `ours-torch`: ours without numba.
- `hybrid`: our engine with ZeRO-3 and an optimizer; each `generate` is a rollout, from `eval()` to `train()`.
- `llama.cpp`: llama-cpp-python's low-level calls and its own greedy sampler, so no Python between a token's layers.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import _memory

CONTEXT = 1024


class Family:
    """One contender; `build` is timed, and its memory watched."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.precision: str = spec["kind"].partition(":")[2]
        self.assets = Path(spec["assets"])
        self.threads: int = spec["threads"]

    def imports(self) -> None:
        """Import what is needed, before memory is watched."""

    def build(self) -> None:
        """Load and prepare the model."""
        raise TypeError(f"{type(self).__name__} cannot be built")

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """`new` tokens for each of the prompts, which are equally long."""
        raise TypeError(f"{type(self).__name__} cannot generate")

    def weight_nbytes(self) -> int:
        """Bytes of weights that decoding a token reads."""
        raise TypeError(f"{type(self).__name__} has no weights")


class Transformers(Family):
    """`generate` of transformers."""

    def imports(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

        torch.set_num_threads(self.threads)

    def load(self) -> Any:
        """The Hugging Face model."""
        import torch
        from transformers import AutoModelForCausalLM

        dtype = {"fp32": torch.float32}.get(self.precision, torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(self.assets / "smollm2", dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    def build(self) -> None:
        self.generator = self.model = self.load()

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        import torch

        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            output = self.generator.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                do_sample=False,
                **self.generate_options(),
            )
        rows: list[list[int]] = output[:, tokens.shape[1] :].tolist()
        return rows

    def generate_options(self) -> dict[str, Any]:
        """More keywords of `generate`."""
        return {}

    def weight_nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def logits(self, tokens: Any) -> Any:
        """[rows, length, vocabulary] of `tokens` [rows, length]."""
        return self.generator(tokens).logits


class Compiled(Transformers):
    """Static cache, decode step compiled by `generate` itself."""

    def build(self) -> None:
        from transformers import CompileConfig, StaticCache

        super().build()
        config = CompileConfig(mode="default", dynamic=False)
        config._compile_all_devices = True  # generate's own switch for compiling where there is no GPU
        self.model.generation_config.compile_config = config
        self.cache = StaticCache(config=self.model.config, max_cache_len=CONTEXT)

    def generate_options(self) -> dict[str, Any]:
        self.cache.reset()
        return {"past_key_values": self.cache}


class Upstream(Transformers):
    """`deepspeed.init_inference` of the peer."""

    def imports(self) -> None:
        super().imports()
        import deepspeed  # noqa: F401

    def build(self) -> None:
        import deepspeed

        self.model = self.load()
        self.generator = deepspeed.init_inference(self.model, dtype=self.model.dtype)


class Ours(Transformers):
    """`ds_inference.init_inference` of this checkout, kernels injected."""

    def imports(self) -> None:
        super().imports()
        import ds_inference

        ds_inference.init_inference  # noqa: B018 (names are imported when they are first used)

    def build(self) -> None:
        import ds_inference

        self.model = self.load()
        if "slots" in self.spec:
            options = {"max_running": self.spec["slots"], "max_length": CONTEXT, **self.options()}
            self.core = ds_inference.LLM(self.model, **options).core
            self.decoder = self.core.decoder
            return
        self.generator = ds_inference.init_inference(
            self.model,
            dtype=self.model.dtype,
            replace_with_kernel_inject=True,
            max_out_tokens=CONTEXT,
            **self.options(),
        )
        self.decoder = self.generator.decoder

    def weight_nbytes(self) -> int:
        model = self.decoder.model  # the embedding is the head, or of an untied one a token reads a row
        linear = [part for layer in model.layers for part in (layer.qkv, layer.output, layer.up, layer.down)]
        return sum(part.weight.nbytes for part in (*linear, model.head))

    def options(self) -> dict[str, Any]:
        """Keywords of the precisions below 16 bits."""
        return {"quantization": self.precision} if self.precision.startswith("int") else {}


class OursCheckpoint(Ours):
    """A model without memory, whose weights the engine reads from the folder."""

    def load(self) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        config = AutoConfig.from_pretrained(self.assets / "smollm2")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
        return model

    def options(self) -> dict[str, Any]:
        return {**super().options(), "checkpoint": str(self.assets / "smollm2")}


class OursTorch(Ours):
    """The same without numba: operations of torch only."""

    def imports(self) -> None:
        os.environ["DS_KERNELS_NUMBA"] = "0"
        super().imports()


class Hybrid(Transformers):
    """`deepspeed.initialize` of this checkout, generating between steps."""

    def imports(self) -> None:
        super().imports()
        import deepspeed

        deepspeed.initialize  # noqa: B018 (names are imported when they are first used)

    def build(self) -> None:
        import deepspeed

        self.model = self.load()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self.precision == "bf16"},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            "zero_optimization": {"stage": 3},
            "hybrid_engine": {"enabled": True, "max_out_tokens": CONTEXT},
        }
        self.generator = deepspeed.initialize(
            model=self.model, model_parameters=self.model.parameters(), config=config
        )[0]

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        self.generator.eval()
        rows = super().generate(prompts, new)
        self.generator.train()
        return rows


class LlamaCpp(Family):
    """llama.cpp on a GGUF file."""

    def imports(self) -> None:
        from _llama import Llama  # noqa: F401

    def build(self) -> None:
        from _llama import Llama

        self.llama = Llama(self.file(), self.threads, self.spec.get("slots", 8), CONTEXT)

    def file(self) -> Path:
        """The GGUF file of this precision."""
        import _infer

        return _infer.shipped_gguf() if self.precision == "q4_1" else self.assets / f"smollm2-{self.precision}.gguf"

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return self.llama.generate(prompts, new)

    def weight_nbytes(self) -> int:
        import _gguf

        return _gguf.weight_nbytes(self.file())


FAMILIES: dict[str, type[Family]] = {
    "transformers": Transformers,
    "compiled": Compiled,
    "upstream": Upstream,
    "ours": Ours,
    "ours-torch": OursTorch,
    "ours-checkpoint": OursCheckpoint,
    "hybrid": Hybrid,
    "llama.cpp": LlamaCpp,
}


class Process:
    """The family of this process and the commands of its parent."""

    def __init__(self, spec: dict[str, Any]) -> None:
        start = time.perf_counter()
        self.family = FAMILIES[spec["kind"].partition(":")[0]](spec)
        self.family.imports()
        process = os.getpid()
        self.facts: dict[str, Any] = {
            "import_s": time.perf_counter() - start,
            "imported_mb": _memory.rss_mb(process),
            "versions": versions(),
        }
        _memory.reset_hwm(process)
        start = time.perf_counter()
        self.family.build()
        self.facts |= {"build_s": time.perf_counter() - start, "build_peak_mb": _memory.hwm_mb(process)}
        self.facts |= {"built_mb": _memory.rss_mb(process)}

    def ready(self) -> dict[str, Any]:
        """What is known before the first token."""
        return self.facts

    def weights(self) -> dict[str, Any]:
        """Bytes of weights."""
        return {"nbytes": self.family.weight_nbytes()}

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Generate once."""
        start = time.perf_counter()
        tokens = self.family.generate(prompts, new)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def perplexity(self, windows: list[list[int]]) -> dict[str, Any]:
        """Mean negative log likelihood of the tokens of every window but its first, given those before them."""
        import torch

        total, count = 0.0, 0
        with torch.inference_mode():
            for window in windows:
                tokens = torch.tensor([window])
                logits = self.family.logits(tokens)[0, :-1].double()  # type: ignore[attr-defined]
                total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
                count += len(window) - 1
        return {"nll": total / count, "perplexity": math.exp(total / count), "count": count}

    def serve(self, **trace: Any) -> dict[str, Any]:
        """Run a trace of requests (see `_infer_serve.py`)."""
        import _infer_serve

        return _infer_serve.run(self.family, **trace)


def versions() -> dict[str, str]:
    """Of what is installed among the peers."""
    found = {}
    for name in ("torch", "transformers", "deepspeed", "llama_cpp_python", "numba"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Build, answer, then run commands until `exit` or the end of stdin."""
    reply = os.fdopen(int(os.environ["DS_BENCH_REPLY_FD"]), "w")

    def answer(value: dict[str, Any]) -> None:
        reply.write(json.dumps(value) + "\n")
        reply.flush()

    try:
        process = Process(json.loads(os.environ["DS_BENCH_SPEC"]))
        answer(process.ready())
        for line in sys.stdin:
            command = json.loads(line)
            verb = command.pop("do")
            if verb == "exit":
                break
            answer(getattr(process, verb)(**command))
    except BaseException:
        answer({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
