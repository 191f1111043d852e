"""No two modules import each other, by whatever way round: at the top, late in a function, or for types alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ROOTS = {"agentspeed": ROOT, "agentspeed_engine": ROOT / "engine", "agentspeed_kernels": ROOT / "kernels"}


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package, folder in ROOTS.items():
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.Module, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a file names in an import, wherever it stands."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name in known)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for alias in names:
                    inner = f"{module}.{alias.name}"
                    yield inner if inner in known else module
            case _:
                pass


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The modules that reach themselves, in groups that reach each other (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[-len(group) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in graph:
        if name not in order:
            visit(name)
    return groups


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {
        name: {other for other in imported(ast.parse(path.read_text(encoding="utf-8")), known) if other in known}
        - {name}
        for name, path in known.items()
    }
    assert len(graph) > 200 and sum(map(len, graph.values())) > 500
    assert circles(graph) == []


def test_a_circle_is_seen_also_one_of_types_and_late_imports() -> None:
    known = dict.fromkeys(("a", "b", "c", "d"), Path())
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from c import C\ndef f():\n    import d\n"
    sources = {"a": "from b import x", "b": late, "c": "import a", "d": ""}
    graph = {name: set(imported(ast.parse(text), known)) & known.keys() for name, text in sources.items()}
    assert graph["b"] == {"c", "d"}
    assert circles(graph) == [["a", "b", "c"]]
