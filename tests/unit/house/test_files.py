"""A file of code has one reason to exist, says it in its first line, and is short enough to be read at one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("agentspeed", "engine/agentspeed_engine", "kernels/agentspeed_kernels")
MOST_LINES = 500


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_longer_than_it_can_be_read_at_one_sitting() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in files(*PACKAGES, "tests", "bench", "tools", "examples")
    }
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_every_module_says_in_a_sentence_why_it_exists() -> None:
    for path in files(*PACKAGES):
        text = path.read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(text)) or ""
        assert len(doc.splitlines()[0] if doc else "") > 20, path
