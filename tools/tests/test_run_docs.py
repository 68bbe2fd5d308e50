"""Blocks run in order, share what they should, and a wrong one fails the page at its line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import run_docs

Write = Callable[[str, str], Path]


def run(page: Path, capfd: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = run_docs.main([str(page), *options])
    captured = capfd.readouterr()
    return status, captured.out + captured.err


def test_a_page_shares_namespace_files_and_directory(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    text = """\
# Page

```python
x = 6
```

```python file=pkg/tool.py
print("from a file")
```

1. In a list:

   ```bash
   python pkg/tool.py > out.txt
   ```

```python
assert open("out.txt").read() == "from a file\\n"
print("product", x * 7)
```

```json
{"shown": "only"}
```
"""
    status, out = run(write("page.md", text), capfd)
    assert status == 0
    assert "product 42" in out
    assert out.endswith("docs: 1 passed, 0 failed\n")


def test_pages_share_nothing(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    first = write("a.md", "```python\nx = 1\nopen('here', 'w').close()\n```\n")
    second = write("b.md", "```python\nimport os\nassert os.listdir('.') == []\nassert 'x' not in globals()\n```\n")
    assert run_docs.main([str(first), str(second)]) == 0
    assert capfd.readouterr().out.endswith("docs: 2 passed, 0 failed\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\n```python\nx = 1\nraise KeyError('gone')\n```\n", 'page.md", line 4, in <module>'),
        ("\n```bash\nfalse | true\necho unreached\n```\n", "page.md:2: bash ended with status 1"),
        ("\n```python\nx = (\n```\n", "SyntaxError"),
        ("text\n```\nx\n```\n", "line 2: a fence without a language"),
        ("```python\nx = 1\n", "line 1: this fence is never closed"),
    ],
)
def test_a_failure_is_told_with_its_line(write: Write, capfd: pytest.CaptureFixture[str], text: str, told: str) -> None:
    status, out = run(write("page.md", text), capfd)
    assert status == 1
    assert told in out
    assert "docs: 0 passed, 1 failed\n" in out


def test_no_run_skips_one_block_and_says_why(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    text = "<!-- no-run: needs a GPU -->\n```python\n1 / 0\n```\n\n```python\nprint('ran')\n```\n"
    status, out = run(write("page.md", text), capfd)
    assert status == 0
    assert "line 2: python not run: needs a GPU" in out
    assert "ran\n" in out


def test_no_run_needs_a_reason(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    status, _ = run(write("page.md", "<!-- no-run: -->\n```python\n1 / 0\n```\n"), capfd)
    assert status == 1


def test_a_page_that_hangs_is_ended_with_all_it_started(
    write: Write, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fifo = tmp_path / "pid"
    text = f"```bash\necho $$ > {fifo}\nsleep 1000\n```\n"
    status, out = run(write("page.md", text), capfd, "--timeout", "2")
    assert status == 1
    assert "not done after 2 s" in out
    deadline = time.monotonic() + 10  # killed already, but a loaded machine may take its time to let it die
    while _alive(int(fifo.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    """A process that still runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
