"""ds-kernels: one optimizer step over one tensor of 50M fp32 parameters, against torch and upstream's CPU ops.

Contenders: ours; torch's fused kernel and torch's foreach loop (for Lion and LAMB, which torch does not have, the same
formula in foreach operations); with DS_BENCH_PEER_PYTHON=PYTHON upstream's compiled CPU optimizer, in a process of its
own, taking turns with the others. Every line says the bytes that a step must move per parameter, the rate, and the
triad's rate in the same run.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from _kernels import KernelBench, options, triad

from ds_kernels import optim

NBYTES = {"adamw": 28, "adagrad": 20, "lion": 20, "sgd": 20, "lamb": 40}
"""Per parameter: read parameter, gradient and states, write parameter and states; LAMB reads and writes twice."""
PEERS = {
    "adamw": "from deepspeed.ops.adam import DeepSpeedCPUAdam as Optimizer",
    "adagrad": "from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad as Optimizer",
    "lion": "from deepspeed.ops.lion import DeepSpeedCPULion as Optimizer",
}
PEER = """
import sys, torch
torch.set_num_threads({threads})
{imports}
p = torch.nn.Parameter(torch.full(({numel},), 0.5))
p.grad = torch.full(({numel},), 0.01)
optimizer = Optimizer([p], lr=1e-5)
print("ready", flush=True)
for line in sys.stdin:
    optimizer.step()
    print("done", flush=True)
"""


class Foreach(torch.optim.Optimizer):
    """Lion and LAMB as one would write them with torch's foreach operations."""

    def __init__(self, params: Any, kind: str) -> None:
        super().__init__(params, {"lr": 1e-5})
        self.kind, self.steps = kind, 0
        self.of = [p for group in self.param_groups for p in group["params"]]
        self.m = [torch.zeros_like(p) for p in self.of]
        self.v = [torch.zeros_like(p) for p in self.of] if kind == "lamb" else []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        grads = [p.grad for p in self.of]
        self.steps += 1
        if self.kind == "lion":
            update = torch._foreach_lerp(self.m, grads, 0.1)
            torch._foreach_sign_(update)
            torch._foreach_add_(self.of, update, alpha=-1e-5)
            torch._foreach_lerp_(self.m, grads, 0.01)
            return
        torch._foreach_lerp_(self.m, grads, 0.1)
        torch._foreach_mul_(self.v, 0.999)
        torch._foreach_addcmul_(self.v, grads, grads, 0.001)
        root = torch._foreach_sqrt(self.v)
        torch._foreach_div_(root, (1 - 0.999**self.steps) ** 0.5)
        torch._foreach_add_(root, 1e-8)
        torch._foreach_mul_(root, 1 - 0.9**self.steps)
        update = torch._foreach_div(self.m, root)
        ratios = [
            -1e-5 * min(max(float(a / b), 0.01), 10.0)
            for a, b in zip(torch._foreach_norm(self.of), torch._foreach_norm(update), strict=True)
        ]
        torch._foreach_mul_(update, ratios)
        torch._foreach_add_(self.of, update)


def contenders(name: str, p: torch.nn.Parameter) -> dict[str, Callable[[], object]]:
    """Those in this process; every one has states of its own."""
    ours: dict[str, Callable[[], Any]] = {
        "adamw": lambda: optim.AdamW([p], lr=1e-5),
        "adagrad": lambda: optim.Adagrad([p], lr=1e-5),
        "lion": lambda: optim.Lion([p], lr=1e-5),
        "sgd": lambda: optim.SGD([p], lr=1e-5, momentum=0.9),
        "lamb": lambda: optim.Lamb([p], lr=1e-5),
    }
    theirs: dict[str, Callable[..., Any]] = {
        "adamw": lambda **how: torch.optim.AdamW([p], lr=1e-5, **how),
        "adagrad": lambda **how: torch.optim.Adagrad([p], lr=1e-5, **how),
        "sgd": lambda **how: torch.optim.SGD([p], lr=1e-5, momentum=0.9, **how),
    }
    found = {"ds_kernels": ours[name]().step}
    if name in theirs:
        found["torch fused"] = theirs[name](fused=True).step
        found["torch foreach"] = theirs[name](foreach=True).step
    else:
        found["torch foreach"] = Foreach([p], name).step
    return found


class Peer:
    """Upstream's optimizer in its own interpreter: a call is one step."""

    def __init__(self, python: str, name: str, numel: int) -> None:
        threads = torch.get_num_threads()
        code = PEER.format(imports=PEERS[name], threads=threads, numel=numel)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._expect("ready")

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # upstream logs to stdout
            if line.strip() == word:
                return
        raise RuntimeError(f"the peer ended with status {self.process.wait()} before it said {word!r}")

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self._expect("done")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--optimizers", default=",".join(NBYTES), help="comma-separated")
    arguments = parser.parse_args()
    bench = KernelBench("kernels_optimizers", arguments)
    for name in arguments.optimizers.split(","):
        p = torch.nn.Parameter(torch.full((arguments.numel,), 0.5, device=arguments.device))
        p.grad = torch.full_like(p, 0.01)
        calls = contenders(name, p)
        for _ in bench.threads():
            has_peer = name in PEERS and arguments.peer_python and arguments.device == "cpu"
            peer = Peer(str(arguments.peer_python), name, arguments.numel) if has_peer else None
            everyone = {**calls, "deepspeed 0.19.8": peer.step} if peer is not None else calls
            case, rate = f"{name} {arguments.numel / 1e6:g}M fp32", triad() / 1e9
            nbytes = NBYTES[name] * arguments.numel
            medians = bench.compare(
                case, everyone, nbytes=nbytes, bytes_per_parameter=NBYTES[name], triad_gb_per_s=rate
            )
            share = nbytes / medians["ds_kernels"] / 1e9 / rate
            print(f"{case}: triad {rate:.1f} GB/s; ours {share:.2f} of it", flush=True)
            if peer is not None:
                peer.close()


if __name__ == "__main__":
    main()
