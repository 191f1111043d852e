"""The API pages name everything public, with its signature and what it is for."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from tools.docs import api_pages, reference

PAGES = Path(__file__).resolve().parents[2] / "docs" / "reference"


@pytest.mark.parametrize("module", reference.API)
def test_every_public_name_has_its_signature_and_its_docstring_on_the_page(module: str) -> None:
    text = (PAGES / reference.API[module]).read_text(encoding="utf-8")
    for name in api_pages.public_names(importlib.import_module(module)):
        assert f"\n## `{name}`\n" in text
        if not isinstance(getattr(importlib.import_module(module), name), ModuleType):
            section = text.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
            code, _, rest = section.partition("```py\n")[2].partition("```")
            assert name in code
            assert rest.strip(), f"{module}.{name} has no docstring"


def test_every_page_is_reached_from_the_index() -> None:
    index = (PAGES.parent / "index.md").read_text(encoding="utf-8")
    for page in PAGES.glob("*.md"):
        assert f"(reference/{page.name})" in index


def test_a_signature_is_written_as_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = (tmp_path / "some_api.py").write_text('''"""A module."""
from typing import overload
class Box:
    """Holds."""
    size: int = 3
    """How much."""
    def __init__(self, one, /, two: str = ",", *rest: int, key: dict[str, int] | None = None, **more: object) -> None:
        """Hidden."""
    @classmethod
    def of(cls, n: int) -> "Box":
        """Makes one."""
    @property
    def full(self) -> bool:
        """No room."""
    @overload
    def put(self, x: int) -> int: ...
    async def put(self, x, *, again=False):
        """Puts."""
    def _hidden(self) -> None: ...
''')
    monkeypatch.syspath_prepend(tmp_path)
    text = api_pages.page("some_api", {}, {})
    assert "class Box(one, /, two: str = ',', *rest: int, key: dict[str, int] | None = None, **more: object)" in text
    assert "- `size: int = 3`: How much." in text
    assert "@classmethod\ndef of(n: int) -> 'Box'" in text
    assert "full: bool" in text and "async def put(x, *, again=False) -> None" in text
    assert "_hidden" not in text and not re.search(r"put\(x: int\)", text)
