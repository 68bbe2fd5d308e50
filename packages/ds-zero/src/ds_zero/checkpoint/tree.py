"""Client state as JSON plus tensors: encode and decode nested containers without pickle.

JSON knows dict with string keys, list, str, int, float, bool and None. Everything else that we accept is a one-key
object whose key begins with `MARK`; a user's dict that has such a key is itself wrapped, so decoding is unambiguous.

    {"$ds": "tensor", "value": NAME}    a tensor, stored under NAME in the rank's shard file
    "ndarray" and "scalar" (numpy), "tuple", "items" (dict with other keys), "float" (inf, nan), "bytes"
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ds_zero.errors import CheckpointError

__all__ = ["decode_tree", "encode_tree"]

MARK = "$ds"
_KEYS = (str, int, float, bool, type(None))


def _wrap(kind: str, value: Any) -> dict[str, Any]:
    return {MARK: kind, "value": value}


def encode_tree(tree: Any, prefix: str, tensors: dict[str, torch.Tensor], *, what: str = "client_state") -> Any:
    """JSON form of `tree`; its tensors are added to `tensors` under `prefix/<path>`.

    Raises:
        TypeError: something that is neither JSON nor a tensor, numpy array or container of them; names its path.
    """
    return _encode(tree, what, prefix, tensors, set())


def _encode(node: Any, path: str, prefix: str, tensors: dict[str, torch.Tensor], parents: set[int]) -> Any:
    if node is None:
        return None
    scalar = _encode_scalar(node)
    if scalar is not None:
        return scalar[0]
    if isinstance(node, (torch.Tensor, np.ndarray)):
        return _encode_array(node, path, prefix, tensors)
    if not isinstance(node, (Mapping, list, tuple)):
        raise TypeError(
            f"{path} is a {type(node).__module__}.{type(node).__qualname__}, which a checkpoint cannot store: it holds "
            "JSON values (dict, list, tuple, str, int, float, bool, None), bytes, tensors and numpy arrays, never "
            "pickled objects; save the object's state_dict() or plain values instead"
        )
    if id(node) in parents:
        raise TypeError(f"{path} contains itself; expected a tree")
    inside = parents | {id(node)}
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, _KEYS):
                raise TypeError(
                    f"{path} has a key {key!r} of type {type(key).__name__}; expected str, int, float or bool"
                )
        encoded = [[key, _encode(value, f"{path}[{key!r}]", prefix, tensors, inside)] for key, value in node.items()]
        if all(type(key) is str for key in node) and MARK not in node:
            return {key: value for key, value in encoded}  # noqa: C416
        return _wrap("items", [[_encode(key, path, prefix, tensors, inside), value] for key, value in encoded])
    items = [_encode(value, f"{path}[{i}]", prefix, tensors, inside) for i, value in enumerate(node)]
    return items if isinstance(node, list) else _wrap("tuple", items)


def _encode_scalar(node: Any) -> tuple[Any] | None:
    if isinstance(node, bool):
        return (node,)
    if isinstance(node, np.generic):
        return (_wrap("scalar", [str(node.dtype), base64.b64encode(node.tobytes()).decode()]),)
    if isinstance(node, str):
        return (str(node),)
    if isinstance(node, int):
        return (int(node),)
    if isinstance(node, float):
        return (float(node) if math.isfinite(node) else _wrap("float", repr(float(node))),)
    if isinstance(node, (bytes, bytearray)):
        return (_wrap("bytes", base64.b64encode(node).decode()),)
    return None


def _encode_array(
    node: torch.Tensor | np.ndarray[Any, Any], path: str, prefix: str, tensors: dict[str, torch.Tensor]
) -> Any:
    kind = "tensor"
    if isinstance(node, np.ndarray):
        kind = "ndarray"
        try:  # a copy, because torch wants writable memory; dtypes that torch lacks go as bytes
            tensor = torch.from_numpy(np.array(node))
        except TypeError:
            if node.dtype.hasobject or node.dtype.names is not None:
                raise TypeError(f"{path} is a numpy array of dtype {node.dtype}; expected numbers") from None
            data = base64.b64encode(np.ascontiguousarray(node).tobytes()).decode()
            return _wrap("rawarray", [str(node.dtype), list(node.shape), data])
    else:
        tensor = node.detach()
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_complex():
            raise TypeError(
                f"{path} is a {tensor.layout} {tensor.dtype} tensor on {tensor.device}; expected dense and real"
            )
    name = f"{prefix}/{len(tensors)}.{path}"
    tensors[name] = tensor
    return _wrap(kind, name)


def decode_tree(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of `encode_tree`."""
    if isinstance(tree, list):
        return [decode_tree(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if MARK not in tree:
        return {key: decode_tree(value, tensors) for key, value in tree.items()}
    kind, value = tree[MARK], tree["value"]
    if kind in ("tensor", "ndarray"):
        if value not in tensors:
            raise CheckpointError(
                f"tensor {value!r} of the client state is not in the checkpoint; its manifest is damaged"
            )
        return tensors[value] if kind == "tensor" else tensors[value].numpy()
    if kind == "items":
        return {decode_tree(key, tensors): decode_tree(item, tensors) for key, item in value}
    if kind == "tuple":
        return tuple(decode_tree(item, tensors) for item in value)
    if kind == "float":
        return float(value)
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "scalar":
        return np.frombuffer(base64.b64decode(value[1]), dtype=np.dtype(value[0]))[0]
    if kind == "rawarray":
        data = np.frombuffer(base64.b64decode(value[2]), dtype=np.dtype(value[0]))
        return data.reshape(value[1]).copy()
    raise CheckpointError(f"the client state has a value of unknown kind {kind!r}; it was written by a newer ds-zero")
