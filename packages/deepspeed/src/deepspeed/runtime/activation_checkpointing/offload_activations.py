"""Keep the inputs of checkpointed layers in host memory, for models that checkpoint by themselves.

`CheckpointHiddenStatesOffload` is a context to run forwards in. Inside, the first tensor that a layer with
`gradient_checkpointing` on is given (transformers' layers) is marked, and where autograd saves a marked tensor, a copy
on the host waits in its place; everything else that is saved passes through. `mark` marks further tensors.

On a host without an accelerator the inputs are in host memory already, and nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook

from deepspeed.runtime.activation_checkpointing.storage import ArgumentStorage

__all__ = ["CheckpointHiddenStatesOffload", "get_checkpoint_hidden_states_offloading_ctx_manager"]


class CheckpointHiddenStatesOffload(saved_tensors_hooks):
    """Inside, marked tensors of at least `min_offload_bytes` that autograd saves wait in host memory.

    The values are the same bits. `offloaded_tensors` and `offloaded_bytes` count. Memory under an accelerator is
    page-locked, and there is no pool of it, so upstream's `use_pin_memory`, `use_streams`, `max_fwd_stash_count`,
    `max_cpu_buffer_pool_count` and `keep_last_count` have no effect.
    """

    def __init__(
        self,
        use_pin_memory: bool = True,
        use_streams: bool = True,
        min_offload_bytes: int = 1024,
        max_fwd_stash_count: int = 2,
        max_cpu_buffer_pool_count: int = 64,
        keep_last_count: int = 1,
    ) -> None:
        super().__init__(self._pack, self._unpack)
        self.min_offload_bytes = min_offload_bytes
        self.offloaded_tensors = 0
        self.offloaded_bytes = 0
        self._storage = ArgumentStorage(to_cpu=True)
        self._marks: dict[tuple[int, torch.Size], Tensor] = {}
        self._hook: Any = None

    def mark(self, tensor: Tensor) -> None:
        """Let `tensor` wait in host memory if autograd saves it, until the context ends."""
        self._marks[tensor.data_ptr(), tensor.shape] = tensor

    def reset(self) -> None:
        """Forget all marks."""
        self._marks.clear()

    def __enter__(self) -> CheckpointHiddenStatesOffload:  # type: ignore[override]
        self._hook = register_module_forward_pre_hook(self._before_forward)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._hook.remove()
        self.reset()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if getattr(module, "gradient_checkpointing", False) and module.training and args and torch.is_tensor(args[0]):
            self.mark(args[0])

    def _pack(self, tensor: Tensor) -> Any:
        marked = self._marks.pop((tensor.data_ptr(), tensor.shape), None)
        if marked is None or tensor.nbytes < self.min_offload_bytes:
            return tensor
        self.offloaded_tensors += 1
        self.offloaded_bytes += tensor.nbytes
        return self._storage.pack(tensor)

    def _unpack(self, kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else self._storage.unpack(kept)


def get_checkpoint_hidden_states_offloading_ctx_manager(
    use_pin_memory: bool = True,
    use_streams: bool = True,
    min_offload_bytes: int = 1024,
    max_fwd_stash_count: int = 2,
    max_cpu_buffer_pool_count: int = 64,
    keep_last_count: int = 1,
) -> CheckpointHiddenStatesOffload:
    """A new `CheckpointHiddenStatesOffload`."""
    return CheckpointHiddenStatesOffload(
        use_pin_memory, use_streams, min_offload_bytes, max_fwd_stash_count, max_cpu_buffer_pool_count, keep_last_count
    )
