"""Each limit is met exactly at its number and broken one above it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import check_limits

FILE = "packages/ds-comm/src/ds_comm/a.py"
ENGINE = "packages/deepspeed/src/deepspeed/engine.py"
Write = Callable[[str, str], Path]


def findings(tmp_path: Path) -> list[str]:
    sources = check_limits.load(tmp_path)
    return [text for source in sources for text in check_limits.check_file(source)] + [
        *check_limits.check_errors(sources)
    ]


def class_text(name: str, num_methods: int, num_attributes: int = 0) -> str:
    lines = [f"class {name}:"]
    lines += [f"    def m{i}(self): ..." for i in range(num_methods - 1)]
    lines += ["    def start(me):", "        pass"]
    lines += [f"        me.a{i} = me.b = me.a{i} = 0" for i in range(num_attributes - 1)]
    return "\n".join(lines) + "\n"


def test_file_lines(write: Write, tmp_path: Path) -> None:
    write(FILE, "x = 1\n" * 600)
    assert findings(tmp_path) == []
    write(FILE, "x = 1\n" * 601)
    assert findings(tmp_path) == [f"{FILE}:1: the file has 601 lines, the limit is 600"]


def test_tests_have_no_limit(write: Write, tmp_path: Path) -> None:
    write("packages/ds-comm/tests/test_a.py", "x = 1\n" * 601)
    assert findings(tmp_path) == []


def test_an_example_is_short(write: Write, tmp_path: Path) -> None:
    write("examples/a.py", "x = 1\n" * 101)
    write("examples/finetune_smollm2.py", "x = 1\n" * 101)
    write("examples/finetune/report.py", "x = 1\n" * 101)
    assert findings(tmp_path) == ["examples/a.py:1: the file has 101 lines, the limit is 100"]


def test_function_lines(write: Write, tmp_path: Path) -> None:
    write(FILE, "class A:\n    async def f():\n" + "        x = 1\n" * 79)
    assert findings(tmp_path) == []
    write(FILE, "class A:\n    async def f():\n" + "        x = 1\n" * 80)
    assert findings(tmp_path) == [f"{FILE}:2: f has 81 lines, the limit is 80"]


def test_class_methods(write: Write, tmp_path: Path) -> None:
    write(FILE, class_text("A", 25))
    assert findings(tmp_path) == []
    write(FILE, class_text("A", 26))
    assert findings(tmp_path) == [f"{FILE}:1: A has 26 methods, the limit is 25"]


def test_overloads_are_not_methods(write: Write, tmp_path: Path) -> None:
    write(FILE, class_text("A", 25) + "    @typing.overload\n    def start(self): ...\n")
    assert findings(tmp_path) == []


def test_class_attributes(write: Write, tmp_path: Path) -> None:
    write(FILE, class_text("A", 1, 20))
    assert findings(tmp_path) == []
    write(FILE, class_text("A", 1, 21))
    assert findings(tmp_path) == [f"{FILE}:1: A has 21 attributes, the limit is 20"]


def test_a_dataclass_has_its_fields_and_a_config_model_does_not(write: Write, tmp_path: Path) -> None:
    fields = "".join(f"    f{i}: int = 0\n" for i in range(21))
    write(FILE, f"@dataclass(frozen=True)\nclass A:\n{fields}class B(BaseModel):\n{fields}")
    assert findings(tmp_path) == [f"{FILE}:2: A has 21 attributes, the limit is 20"]


def test_only_the_engine_may_be_large(write: Write, tmp_path: Path) -> None:
    write(ENGINE, class_text("DeepSpeedEngine", 45))
    assert findings(tmp_path) == []
    write(ENGINE, class_text("DeepSpeedEngine", 46) + class_text("Other", 26))
    assert [line.split(": ", 1)[1] for line in findings(tmp_path)] == [
        "DeepSpeedEngine has 46 methods, the limit is 45",
        "Other has 26 methods, the limit is 25",
    ]


def test_at_most_six_errors(write: Write, tmp_path: Path) -> None:
    text = "class E0(ValueError): ...\n" + "".join(f"class E{i}(E{i - 1}): ...\n" for i in range(1, 6))
    write(FILE, text)
    assert findings(tmp_path) == []
    write("packages/ds-comm/src/ds_comm/b.py", "class E6(E5): ...\nclass NoError: ...\n")
    assert ["has 7 exception classes" in line for line in findings(tmp_path)] == [True]


def test_an_error_is_a_builtin_one(write: Write, tmp_path: Path) -> None:
    write(FILE, "class Root(Exception): ...\nclass Good(Root, ValueError): ...\nclass Bad(Root): ...\n")
    (found,) = findings(tmp_path)
    assert found.startswith(f"{FILE}:3: Bad is no builtin error")


def test_the_command_counts_and_fails(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(FILE, "x = 1\n" * 601)
    assert check_limits.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "limits: 1 files, 1 findings"
