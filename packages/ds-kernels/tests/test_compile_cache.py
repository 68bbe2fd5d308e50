"""The run that compiles numba's kernels and the runs that find them in the cache compute the same bits.

numba compiles a function that a kernel calls once by itself and once within the kernel. A process that compiles calls
the first, one that loads from the cache the second: where the compiler may reorder a sum, they can differ in the last
bit, and a program's second run from its first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_kernels._cpu.launch import HAS_NUMBA

pytestmark = pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")

PROGRAM = """
import itertools, hashlib, torch, ds_kernels
from ds_kernels.optim import adam_step, lamb_step

def bits(name, *tensors):
    data = b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)
    print(name, hashlib.sha256(data).hexdigest()[:16])

def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)

torch.manual_seed(0)
targets = torch.randint(0, 193, (37,))
cases = {
    "rms_norm": (ds_kernels.rms_norm, leaf(37, 193), leaf(193)),
    "layer_norm": (ds_kernels.layer_norm, leaf(37, 193), leaf(193), leaf(193)),
    "softmax": (ds_kernels.softmax, leaf(37, 193)),
    "cross_entropy": (lambda x: ds_kernels.cross_entropy(x, targets, label_smoothing=0.1), leaf(37, 193)),
    "flash_attention": (
        lambda q, k, v: ds_kernels.flash_attention(q, k, v, causal=True),
        leaf(2, 67, 4, 33), leaf(2, 67, 2, 33), leaf(2, 67, 2, 33),
    ),
}
for name, (op, *inputs) in cases.items():
    result = op(*inputs)
    result.backward(torch.ones_like(result) / 3)
    bits(name, result, *(t.grad for t in inputs))

state = [torch.randn(20_011), torch.randn(20_011), *(torch.rand(20_011) for _ in range(3))]
pieces = [t.clone() for t in state]
adam_step(*state[:4], max_exp_avg_sq=state[4], step=4, lr=0.1, weight_decay=0.1)
for low, high in itertools.pairwise([0, 1, 33, 1000, 1031, 20_011]):
    p = [t[low:high] for t in pieces]
    adam_step(*p[:4], max_exp_avg_sq=p[4], step=4, lr=0.1, weight_decay=0.1)
bits("adam whole", *state)
bits("adam pieces", *pieces)
lamb_step(*state[:4], step=4, lr=0.1, weight_decay=0.1)
bits("lamb", *state)
"""


def run(cache: Path) -> dict[str, str]:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    return dict(line.rsplit(" ", 1) for line in found.stdout.splitlines())


def test_the_first_run_has_the_bits_of_the_second(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert list(tmp_path.rglob("*.nbc")), "nothing was cached, so the second run tests nothing"
    second = run(tmp_path)
    assert first == second
    assert first["adam whole"] == first["adam pieces"]
