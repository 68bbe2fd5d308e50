"""Peak memory per rank of ZeRO stages 0-3: this project, upstream DeepSpeed, FSDP2, DDP (fp32).

One contender at a time. Each is built as sparingly as it can be: engines at stage 3 under `zero.Init`, below stage 3
directly in the training dtype, FSDP2 on the meta device. Two phases are reported, as the highest rank's peak: `whole`
(the process from its start: imports, building, training) and `train` (peaks reset before the steps).
"""

from __future__ import annotations

import _common
import models
from _common import Bench
from _ranks import Contender

CASES = [("smollm2", "bf16"), ("gpt", "bf16"), ("gpt", "fp32")]
STEPS = 3


def contenders(model: str, dtype: str, quick: bool) -> list[Contender]:
    """All contenders of one model, in the order they run."""
    found = []
    for stage in (2, 3) if quick else range(4):
        found += [Contender("engine", model, dtype, stage, upstream=peer, random=True) for peer in (False, True)]
    found.append(Contender("fsdp2", model, dtype, random=True))
    return [*found, Contender("ddp", model, dtype)] if dtype == "fp32" else found


def main() -> None:
    """Run the cases asked for and append their results."""
    parser = _common.options(__doc__)
    parser.add_argument("--model", choices=models.MODELS)
    parser.add_argument("--dtype", choices=tuple(models.DTYPES))
    parser.add_argument("--stage", type=int, choices=range(4), help="engines at this stage only")
    options = parser.parse_args()
    cases = CASES[:1] if options.quick else CASES
    with Bench("zero_memory", options) as bench:
        for model, dtype in cases:
            if options.model in (None, model) and options.dtype in (None, dtype):
                for contender in bench.chosen(contenders(model, dtype, options.quick)):
                    if options.stage is None or contender.stage in (None, options.stage):
                        measure(bench, contender)


def measure(bench: Bench, contender: Contender) -> None:
    """Start, watch, train a few steps, write a line."""
    group = bench.start(contender)
    sampler = group.sample_memory()
    with group:
        built = sampler.read()
        sampler.reset()
        losses = group.steps(STEPS).losses
        train = sampler.read()
        whole = {key: max(built[key], train[key]) for key in train}
        bench.write(contender, build_peak=built, train_peak=train, whole_peak=whole, losses=losses, **group.ready)
        print(
            f"{group}: whole {whole['hwm_mb']:.0f} MB HWM, {whole['pss_mb']:.0f} PSS; training {train['hwm_mb']:.0f} "
            f"HWM, {train['pss_mb']:.0f} PSS, {train['data_mb']:.0f} of it data; {group.ready['imported_mb']:.0f} "
            f"after imports",
            flush=True,
        )


if __name__ == "__main__":
    main()
