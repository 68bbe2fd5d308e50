"""Token sequences in Megatron's indexed format: `PREFIX.bin` has all tokens in a row, `PREFIX.idx` where each lies.

The index, little-endian: the 9 bytes `MMIDIDX\\0\\0`; version (int64, 1); the code of the dtype (one byte, `dtypes`);
the number of sequences S and of document bounds D (int64 each); S lengths (int32); S offsets in bytes (int64); D
bounds (int64), the numbers of the sequences at which documents begin, with 0 first and S last.

Files are mapped, so a dataset takes no memory and many processes share one copy. Upstream's older formats (`lazy`,
`cached`) are refused.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepspeed._lazy import explain_absent

__all__ = [
    "MMapIndexedDataset",
    "MMapIndexedDatasetBuilder",
    "code",
    "data_file_path",
    "dataset_exists",
    "dtypes",
    "get_available_dataset_impl",
    "index_file_path",
    "infer_dataset_impl",
    "make_builder",
    "make_dataset",
]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_SMALL_VOCABULARY = 65500

dtypes: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.uint16,
    7: np.uint32,
    8: np.uint64,
}
"""Code in the index -> numpy dtype of a token."""


def code(dtype: Any) -> int:
    """The code of a dtype; ValueError for one that the format does not have."""
    for number, known in dtypes.items():
        if np.dtype(known) == np.dtype(dtype):
            return number
    raise ValueError(
        f"the indexed format has no dtype {np.dtype(dtype)}; expected one of "
        f"{', '.join(np.dtype(known).name for known in dtypes.values())}"
    )


def data_file_path(prefix_path: str) -> str:
    """The file of the tokens."""
    return f"{prefix_path}.bin"


def index_file_path(prefix_path: str) -> str:
    """The file of the index."""
    return f"{prefix_path}.idx"


def get_available_dataset_impl() -> list[str]:
    """The kinds of files that can be made and read."""
    return ["mmap"]


def dataset_exists(path: str, impl: str) -> bool:
    """Whether both files are there."""
    _check_impl(impl)
    return MMapIndexedDataset.exists(path)


def infer_dataset_impl(path: str) -> str | None:
    """ "mmap" when an index of this format is there, else None."""
    if not MMapIndexedDataset.exists(path):
        return None
    with open(index_file_path(path), "rb") as file:
        return "mmap" if file.read(len(_MAGIC)) == _MAGIC else None


def make_builder(out_file: str, impl: str, vocab_size: int | None = None) -> MMapIndexedDatasetBuilder:
    """A builder that writes tokens as uint16 when the vocabulary fits in it, else as int32."""
    _check_impl(impl)
    small = vocab_size is not None and vocab_size < _SMALL_VOCABULARY
    return MMapIndexedDatasetBuilder(out_file, dtype=np.uint16 if small else np.int32)


def make_dataset(path: str, impl: str, skip_warmup: bool = False) -> MMapIndexedDataset:
    """The dataset of a prefix; FileNotFoundError without its files."""
    _check_impl("mmap" if impl == "infer" else impl)
    return MMapIndexedDataset(path, skip_warmup)


def _check_impl(impl: str) -> None:
    if impl != "mmap":
        raise ValueError(f"impl is {impl!r}; expected mmap (upstream's lazy and cached files are not read)")


class MMapIndexedDataset(torch.utils.data.Dataset[NDArray[Any]]):
    """Sequences of tokens by number: `dataset[3]` is a numpy array, `dataset[2:5]` a list of them.

    Args:
        path: prefix of the two files.
        skip_warmup: accepted; nothing is read ahead.

    Raises:
        FileNotFoundError: one of the files is missing. ValueError: the index is of another format, or cut short.
    """

    def __init__(self, path: str, skip_warmup: bool = False) -> None:
        self._open(os.fspath(path))

    def _open(self, path: str) -> None:
        self._path = path
        for file in (index_file_path(path), data_file_path(path)):
            if not os.path.exists(file):
                raise FileNotFoundError(f"{file} is missing; an indexed dataset is PREFIX.bin and PREFIX.idx")
        index = np.memmap(index_file_path(path), mode="r", dtype=np.uint8)
        self._dtype, count, documents = _read_header(index_file_path(path), bytes(index[: _HEADER.size]))
        expected = _HEADER.size + 12 * count + 8 * documents
        if len(index) < expected:
            raise ValueError(
                f"{index_file_path(path)} has {len(index)} bytes, its header says {expected}: it was cut short"
            )
        raw, at = index.data, _HEADER.size
        self._sizes = np.frombuffer(raw, np.int32, count, at)
        self._pointers = np.frombuffer(raw, np.int64, count, at + 4 * count)
        self._doc_idx = np.frombuffer(raw, np.int64, documents, at + 12 * count)
        total = os.path.getsize(data_file_path(path))
        end = int(self._pointers[-1]) + int(self._sizes[-1]) * self._dtype.itemsize if count else 0
        if total < end:
            raise ValueError(f"{data_file_path(path)} has {total} bytes, its index says {end}: it was cut short")
        self._data = np.memmap(data_file_path(path), mode="r", dtype=np.uint8) if total else np.empty(0, np.uint8)

    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, state: str) -> None:
        self._open(state)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, idx: int | slice) -> Any:
        if not isinstance(idx, slice):
            return self.get(idx)
        start, stop, step = idx.indices(len(self))
        if step != 1:
            raise ValueError(f"slices of an indexed dataset are contiguous; the step is {step}, expected 1")
        return [self.get(number) for number in range(start, stop)]

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """`length` tokens of one sequence from `offset`, to its end by default; a read-only view of the file."""
        size = int(self._sizes[idx])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"sequence {idx} has {size} tokens; tokens {offset} to {offset + length} are not in it")
        start = int(self._pointers[idx]) + offset * self._dtype.itemsize
        return np.frombuffer(self._data.data, self._dtype, length, start)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Length of each sequence."""
        return self._sizes

    def size(self, index: int) -> int:
        """Length of one sequence."""
        return int(self._sizes[index])

    @property
    def doc_idx(self) -> NDArray[np.int64]:
        """Numbers of the sequences at which documents begin, and one past the last."""
        return self._doc_idx

    def get_doc_idx(self) -> NDArray[np.int64]:
        """The same as `doc_idx`."""
        return self._doc_idx

    def set_doc_idx(self, doc_idx_: NDArray[np.int64]) -> None:
        """Use other document bounds; the file stays as it is."""
        self._doc_idx = doc_idx_

    @property
    def dtype(self) -> type[np.generic]:
        """numpy dtype of a token."""
        return self._dtype.type

    @property
    def supports_prefetch(self) -> bool:
        """False: the system reads ahead by itself."""
        return False

    @staticmethod
    def exists(path: str) -> bool:
        """Whether both files of a prefix are there."""
        return os.path.exists(index_file_path(path)) and os.path.exists(data_file_path(path))


def _read_header(file: str, header: bytes) -> tuple[np.dtype[Any], int, int]:
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{file} is no index of the mmap format: it begins with {header[:9]!r}, expected {_MAGIC!r}")
    _, version, kind, count, documents = _HEADER.unpack(header)
    if version != 1 or kind not in dtypes:
        raise ValueError(f"{file}: version {version} and dtype code {kind}; expected version 1 and a code of 1 to 8")
    return np.dtype(dtypes[kind]), count, documents


class MMapIndexedDatasetBuilder:
    """Writes an indexed dataset, one sequence after another; `finalize` writes the index.

    Args:
        out_file: the file of the tokens, `PREFIX.bin`.
        dtype: numpy dtype of a token.
    """

    def __init__(self, out_file: str, dtype: Any = np.int64) -> None:
        self._kind = code(dtype)
        self._dtype = np.dtype(dtype)
        self._file = open(out_file, "wb")  # noqa: SIM115 (closed by finalize)
        self._sizes: list[int] = []
        self._doc_idx = [0]

    def add_item(self, tensor: torch.Tensor) -> None:
        """Append one sequence; ValueError for tokens that the dtype does not hold."""
        self.add_item_numpy(tensor.numpy())

    def add_items(self, arr_list: Iterable[NDArray[Any]]) -> None:
        """Append several sequences."""
        for array in arr_list:
            self.add_item_numpy(array)

    def add_item_numpy(self, np_array: NDArray[Any]) -> None:
        """Append one sequence; ValueError for tokens that the dtype does not hold."""
        tokens = np_array.astype(self._dtype)
        if not np.array_equal(tokens, np_array):
            raise ValueError(
                f"sequence {len(self._sizes)} has tokens from {np_array.min()} to {np_array.max()}, which "
                f"{self._dtype} does not hold; give the builder a wider dtype or the true vocab_size"
            )
        self._file.write(tokens.tobytes(order="C"))
        self._sizes.append(tokens.size)

    def end_document(self) -> None:
        """The sequences since the last call are a document."""
        self._doc_idx.append(len(self._sizes))

    def merge_file_(self, another_file: str) -> None:
        """Append a whole dataset (its prefix); ValueError when its dtype is another."""
        other = MMapIndexedDataset(another_file)
        if np.dtype(other.dtype) != self._dtype:
            raise ValueError(f"{another_file} has tokens of {np.dtype(other.dtype)}, expected {self._dtype}")
        self._doc_idx += [len(self._sizes) + int(bound) for bound in other.doc_idx[1:]]
        self._sizes += other.sizes.tolist()
        with open(data_file_path(another_file), "rb") as file:
            shutil.copyfileobj(file, self._file)

    def finalize(self, index_file: str) -> None:
        """Close the file of the tokens and write the index, `PREFIX.idx`."""
        self._file.close()
        sizes = np.array(self._sizes, dtype=np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(sizes) else ends
        with open(index_file, "wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, self._kind, len(sizes), len(self._doc_idx)))
            for array in (sizes, pointers, np.array(self._doc_idx, dtype=np.int64)):
                file.write(array.tobytes(order="C"))


explain_absent(__name__)
