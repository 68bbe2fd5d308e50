"""Every public name stands in its package's page."""

from __future__ import annotations

import pytest

import list_names


@pytest.mark.parametrize("package", list_names.PAGES)
def test_pages_list_every_public_name(package: str) -> None:
    page = (list_names.ROOT / list_names.PAGES[package]).read_text(encoding="utf-8")
    assert page.endswith(list_names.section(package)), f"run python tools/list_names.py for {list_names.PAGES[package]}"


@pytest.mark.parametrize("package", list_names.PAGES)
def test_every_name_is_explained(package: str) -> None:
    rows = [row for row in list_names.section(package).splitlines() if row.startswith("| `")]
    assert len(rows) > 20
    assert not [row for row in rows if row.endswith("|  |")]


def test_summaries() -> None:
    assert list_names.first_sentence("One thing;\n    two things. Three.\n\nMore.") == "One thing"
    assert list_names.first_sentence("A | b.") == "A \\| b"
    assert list_names.first_sentence(None) == ""
    assert list_names.summary("ds_zero", "no_such_name") == ""
