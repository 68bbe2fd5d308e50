"""The child's side of the rank pool: one process that plays one rank, call after call.

Vocabulary
  call      what the parent sends: a function by reference, its pickled arguments, rank, world size, environment.
  outcome   what goes back: the pickled result, or the traceback.
  finish    the parent's word that every rank has an outcome. Only then is the world torn down, so that a rank that is
            ready early never closes a connection its peers still read from.

Invariants
  - Each call has a fresh world (a FileStore in the parent's temporary folder; no ports) and leaves none behind.
  - Environment, working directory, default dtype, thread count, grad mode and signal handlers are put back.
  - The process dies with its parent: by PR_SET_PDEATHSIG on Linux, and everywhere when its connection closes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import io
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

import ds_comm

DUMP_SIGNAL = signal.SIGUSR1
"""A worker that gets this signal writes the stack of each of its threads to its output, even from inside C++ code."""
MAIN_ALIAS = "__mp_main__"
"""Name under which a worker imports the parent's `__main__` file, so that `if __name__ == "__main__"` stays shut."""
_PR_SET_PDEATHSIG = 1
_SEED = 0


@dataclass(frozen=True)
class FunctionRef:
    """A module-level function by name and file; the file is needed where the module's folder is not on `sys.path`."""

    module: str
    qualname: str
    path: str | None


@dataclass(frozen=True)
class Call:
    """One rank's part of one `run_ranks`; `payload` is the pickled `(args, kwargs)`, read once the module is there."""

    function: FunctionRef
    payload: bytes
    rank: int
    world_size: int
    store_path: str
    timeout: float
    env: dict[str, str]
    sys_path: list[str]


@dataclass(frozen=True)
class Outcome:
    """A result (`error` is None) or a failure; `when` is the system-wide monotonic clock in seconds."""

    when: float
    payload: bytes = b""
    error: str | None = None
    message: str = ""
    traceback: str = ""


class _ByValue(pickle.Pickler):
    """Pickles a tensor by value and alone: plain pickle would send the whole storage behind a small view."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
            return NotImplemented
        if obj.untyped_storage().nbytes() <= obj.nbytes:
            return NotImplemented
        compact = obj.detach().clone(memory_format=torch.contiguous_format).requires_grad_(obj.requires_grad)
        return compact.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def dumps(obj: Any) -> bytes:
    """`pickle.dumps` with tensors by value."""
    buffer = io.BytesIO()
    _ByValue(buffer, pickle.HIGHEST_PROTOCOL).dump(obj)
    return buffer.getvalue()


def _same_file(module: ModuleType | None, path: str | None) -> bool:
    file = getattr(module, "__file__", None)
    return path is None or (file is not None and os.path.realpath(file) == os.path.realpath(path))


def _find(name: str) -> str | None:
    """The file that `import name` would load, or None."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: a loaded module without a spec
        return None
    return None if spec is None else spec.origin


def _load_module(ref: FunctionRef) -> ModuleType:
    """Import the function's module: by name where that finds the right file, else straight from its file."""
    name = MAIN_ALIAS if ref.module == "__main__" else ref.module
    loaded = sys.modules.get(name)
    if loaded is not None and _same_file(loaded, ref.path):
        return loaded
    sys.modules.pop(name, None)  # another file of the same name: test modules of two packages may share a basename
    found = _find(name)
    if ref.path is None or (found is not None and os.path.realpath(found) == os.path.realpath(ref.path)):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, ref.path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {ref.path!r} as module {name!r}")
    module = importlib.util.module_from_spec(spec)
    parents = name.split(".")[:-1]
    for depth in range(len(parents)):  # pytest's importlib mode makes up packages too; unpickling looks for them
        parent = ".".join(parents[: depth + 1])
        if _find(parent) is None:
            sys.modules.setdefault(parent, ModuleType(parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if ref.module == "__main__":
        sys.modules["__main__"] = module  # classes of the parent's script pickle as `__main__.X`
    return module


def resolve(ref: FunctionRef) -> Callable[..., Any]:
    """The function that `ref` names, importing its module."""
    target: Any = _load_module(ref)
    for part in ref.qualname.split("."):
        target = getattr(target, part)
    return target  # type: ignore[no-any-return]


def _restore_after(stack: ExitStack) -> None:
    """Register on `stack` what puts the process back as it is now."""
    environment = dict(os.environ)

    def restore_environment() -> None:
        os.environ.clear()
        os.environ.update(environment)

    stack.callback(restore_environment)
    stack.callback(os.chdir, os.getcwd())
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
    deterministic = torch.are_deterministic_algorithms_enabled()

    def restore_determinism() -> None:
        if torch.are_deterministic_algorithms_enabled() != deterministic:  # the setter imports the whole compiler
            torch.use_deterministic_algorithms(deterministic)

    stack.callback(restore_determinism)
    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.getsignal(number))


def _enter_world(call: Call) -> None:
    rank, size = str(call.rank), str(call.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # for code that reads them; nothing connects there
    os.environ.update(call.env)
    store = dist.FileStore(call.store_path, call.world_size)  # type: ignore[attr-defined]  # public, but not exported
    # The collectives give up a little before the parent does: their error names who is missing and where.
    patience = timedelta(seconds=max(call.timeout - 5.0, call.timeout / 2))
    dist.init_process_group("gloo", store=store, rank=call.rank, world_size=call.world_size, timeout=patience)
    ds_comm.init_distributed(timeout=patience)
    _seed_everything()


def _seed_everything() -> None:
    """Seed `random`, torch, and numpy where it is loaded: alike on every rank, as models are built alike."""
    random.seed(_SEED)
    torch.manual_seed(_SEED)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(_SEED)


def _leave_world() -> str:
    """Tear the world down; returns what is left of it (then the parent replaces this process), or an empty string."""
    try:
        if dist.is_initialized():
            ds_comm.destroy_process_group()
        if dist.is_initialized() or ds_comm.is_initialized():
            return "a process group survived destroy_process_group()"
    except Exception:
        return traceback.format_exc()
    return ""


def _trim(error: BaseException) -> str:
    """The traceback without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _run(call: Call) -> Outcome:
    try:
        sys.path[:] = call.sys_path
        function = resolve(call.function)
        _enter_world(call)
        args, kwargs = pickle.loads(call.payload)
        return Outcome(when=time.monotonic(), payload=dumps(function(*args, **kwargs)))
    except BaseException as error:  # SystemExit and KeyboardInterrupt of a rank are its outcome, not the worker's end
        return Outcome(time.monotonic(), error=type(error).__name__, message=str(error), traceback=_trim(error))


def _collect_garbage() -> None:
    gc.collect()
    gc.freeze()  # what survives a call are modules: walking all of torch's again would cost 0.25 s at every call


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def main(fd: int, parent: int | None) -> None:
    """Serve calls from the connection `fd` until it closes, or until process `parent` dies (even within a call)."""
    if parent is not None:
        _die_with(parent)
    os.set_inheritable(fd, False)  # a child of a rank must not hold the connection open after the rank's death
    connection = Connection(fd)
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    torch.set_num_threads(1)
    _collect_garbage()
    connection.send("ready")
    while True:
        try:
            call: Call = connection.recv()
        except EOFError:
            return
        with ExitStack() as stack:
            _restore_after(stack)
            connection.send(_run(call))
            connection.recv()  # finish
            left = _leave_world()
        _collect_garbage()
        connection.send(left)
