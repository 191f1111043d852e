"""Every Python block of the documentation runs; every generated page is what its source says today.

A block in ```python is a program. One in ```py is no program: signatures in docs/reference, which its generator writes,
and the shortened engine, whose names are looked up here.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


SHORTENED = ROOT / "docs" / "explanation" / "engine-in-150-lines.md"
LANGUAGES = {"python", "py", "console", "text", "toml", "mermaid"}


def with_code() -> list[Path]:
    return [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", with_code(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page: Path) -> None:
    code = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout}{done.stderr}"


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "docs" / "reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nRun: python tools/docs/reference.py"


def anchors(page: Path) -> set[str]:
    """What links to a page may name behind a #: its headings, as GitHub writes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.+?) *$", text, re.MULTILINE)
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_pages_lead_somewhere() -> None:
    elsewhere = [
        ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "agentspeed/models/nano/README.md")
    ]
    broken = []
    for page in [*PAGES, *elsewhere]:
        for target in re.findall(r"\]\(([^)\s:]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            to = page.parent / name if name else page
            if not to.exists() or (anchor and anchor not in anchors(to)):
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken


def test_files_that_pages_name_are_there() -> None:
    gone = []
    for page in PAGES:
        for name in re.findall(r"\b(?:tests|bench|tools|examples)/[\w/]+\.py\b", page.read_text(encoding="utf-8")):
            if not (ROOT / name).exists():
                gone.append(f"{page.relative_to(ROOT)}: {name}")
    assert not gone


def test_no_block_of_python_hides_behind_another_name() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0 and set(fences[1::2]) <= {""}, page
        opened = set(fences[::2])
        assert opened <= LANGUAGES, (page, opened - LANGUAGES)
        assert "py" not in opened or page == SHORTENED or page.parent.name == "reference", page


def test_the_shortened_engine_has_the_names_of_the_real_one() -> None:
    (text,) = re.findall(r"^```py\n(.*?)^```", SHORTENED.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert text.count("\n") <= 150
    named = re.findall(r"^# ((?:kv|sched|exec|serve|protocol)\.\w+)|(kv\.\w+):", text, re.MULTILINE)
    modules = [importlib.import_module(f"agentspeed_engine.{first or second}") for first, second in named]
    assert len(modules) >= 8
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found = importlib.import_module(node.module)
            assert all(hasattr(found, alias.name) for alias in node.names)
        if isinstance(node, ast.ClassDef):
            (real,) = {vars(module)[node.name] for module in modules if node.name in vars(module)}
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]  # type: ignore[union-attr]
            assert [name for name in methods if not hasattr(real, name)] == [], node.name
            slots = {*getattr(real, "__slots__", ()), *vars(real)}
            assert [name for name in fields if name not in slots] == [], node.name


def test_every_decision_has_a_number_of_its_own_and_begins_with_it() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [page.name[:4] for page in pages]
    assert len(set(numbers)) == len(numbers) > 20
    for page, number in zip(pages, numbers, strict=True):
        assert page.read_text(encoding="utf-8").startswith(f"# {number} "), page.name


def test_the_layers_that_contributors_read_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    checked = {one["containers"][0]: one["layers"] for one in contracts if one.get("exhaustive")}
    told: dict[str, list[str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if (found := re.match(r"^ {4}(\w+)(?: {2,}|$)", line)) is not None:
            told[found[1]] = layers = []
        elif (found := re.match(r"^ {8}(\S+(?: \| \S+)*)(?: {2,}|$)", line)) is not None:
            layers.append(found[1])
    for package in ("agentspeed", "agentspeed_engine", "agentspeed_kernels"):
        assert told[package] == checked[package]
