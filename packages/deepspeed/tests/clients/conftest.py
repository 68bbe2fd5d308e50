"""What the tests of clients share: a tiny model on disk, made once, and ranks that know nothing of earlier modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hf_cases
import pytest
import torch

from ds_comm.testing import run_ranks

TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def nothing_remembered() -> Iterator[None]:
    """Clients keep state in a process, some of it until garbage is collected: then only on one of the pool's ranks."""
    yield
    hf_cases.forget()
    run_ranks(hf_cases.forget, 2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer and, where PEFT is there, an adapter of it (in `lora`)."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "t1", "pad_token": "t2", "unk_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    try:
        import peft
    except ImportError:
        return folder
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(model, adapter).save_pretrained(folder / "lora")
    return folder
