"""Modules that prose names in backticks (`kv.tree`, `sched.core`) exist: in the docs, in docstrings and in comments."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = (ROOT / "agentspeed", ROOT / "engine" / "agentspeed_engine", ROOT / "kernels" / "agentspeed_kernels")
FORMER = {"front", "backends"}
"""Folders that are no more, so that their names lead nowhere."""
NAMED = re.compile(r"`(?:agentspeed(?:_engine|_kernels)?\.)?([a-z_]+)\.([a-z_]\w*)[.\w]*`")


def folders() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for package in PACKAGES:
        for path in package.iterdir():
            if (path / "__init__.py").exists():
                found.setdefault(path.name, []).append(path)
    return found


def texts() -> list[Path]:
    """Decisions are left out: they say what was so when they were taken."""
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "decisions"]
    code = [
        path
        for top in (*PACKAGES, ROOT / "tests", ROOT / "bench", ROOT / "tools")
        for path in sorted(top.rglob("*.py"))
    ]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages, *code]


def test_modules_named_in_prose_exist() -> None:
    known, lost, seen = folders(), [], 0
    for path in texts():
        for first, second in NAMED.findall(path.read_text(encoding="utf-8")):
            if first not in known and first not in FORMER:
                continue  # an attribute of something, a file, another library
            seen += 1
            places = known.get(first, [])
            own = any((place / f"{second}.py").exists() or (place / second).is_dir() for place in places)
            if not own and not any(
                re.search(rf"\b{second}\b", (place / "__init__.py").read_text(encoding="utf-8")) for place in places
            ):
                lost.append(f"{path.relative_to(ROOT)}: {first}.{second}")
    assert seen > 50
    assert lost == []
