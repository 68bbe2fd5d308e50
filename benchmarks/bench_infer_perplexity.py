"""Perplexity of SmolLM2-135M on held-out text in fp32, bf16, int8 and int4 (ours), against transformers in fp32.

Text: CPython's `pydoc_data.topics`, the topics in order of their names, tokenised as one, cut into windows of 512
tokens; `--windows` of them, spread evenly, each read alone. Per window the first token is given and 511 are predicted;
the figure is exp of the mean negative log likelihood of all of them, log-softmax in fp64. Nothing is calibrated on any
text. The weights are the package's, rounded to bf16; "fp32" computes with them in fp32. They were 4-bit once (Q4_1,
groups of 32): int8 and int4 quantise them anew.
"""

from __future__ import annotations

import _infer

CONTENDERS = ("transformers:fp32", "transformers:bf16", "ours:fp32", "ours:bf16", "ours:int8", "ours:int4")
LENGTH = 512


def main() -> None:
    parser = _infer.options(__doc__)
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens")
    arguments = parser.parse_args()
    count = min(arguments.windows, 4) if arguments.quick else arguments.windows
    with _infer.InferBench("infer_perplexity", arguments) as bench:
        bench.prepare()
        windows = _infer.windows(bench.assets, LENGTH, count)
        baseline = None
        for contender in bench.contenders(CONTENDERS):
            with bench.start(contender) as group:
                answer = group.ask({"do": "perplexity", "windows": windows})[0]
                versions = group.ready["versions"]
            baseline = baseline or answer["perplexity"]
            ratio = answer["perplexity"] / baseline
            bench.line(contender.label, windows=count, length=LENGTH, **answer, over_first=ratio, versions=versions)
            print(f"{contender.label:20} {answer['perplexity']:.4f}  {ratio - 1:+.2%}", flush=True)


if __name__ == "__main__":
    main()
