"""The page about `agentspeed top` explains every reason for waiting that the scheduler can give, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCHED = ROOT / "engine" / "agentspeed_engine" / "sched"
ROOTS = {"inspection": {"waiting_for"}, "step": {"_shortage"}, "admission": {"lacks"}}
"""Who gives reasons: what a look says, and what a turn was refused for (`_refuse`)."""


def tree(module: str) -> ast.Module:
    return ast.parse((SCHED / f"{module}.py").read_text(encoding="utf-8"))


def reasons(module: str) -> set[str]:
    """What those functions, and the functions of their module that make texts for them, can return."""
    found = tree(module)
    functions = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    constants = {
        target.id: node.value
        for node in found.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    told: set[str] = set()
    left, seen = set(ROOTS[module]), set[str]()
    while left:
        seen.add(name := left.pop())
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Return) and node.value is not None:
                told.update(texts(node.value, constants))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                gives = functions[node.func.id].returns
                if isinstance(gives, ast.Name) and gives.id == "str":
                    left.update({node.func.id} - seen)
    return told - {""}


def texts(value: ast.expr, constants: dict[str, ast.expr]) -> Iterator[str]:
    match value:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in parts)
        case ast.IfExp(body=first, orelse=other):
            yield from (*texts(first, constants), *texts(other, constants))
        case ast.BoolOp(values=several):
            yield from (text for one in several for text in texts(one, constants))
        case ast.Name(id=name) if name in constants:
            yield from texts(constants[name], constants)
        case _:
            pass


def test_the_table_names_every_reason_and_no_other() -> None:
    page = (ROOT / "docs" / "how-to" / "watching.md").read_text(encoding="utf-8")
    table = page.partition("What a branch waits for:\n\n")[2].partition("\n\n")[0]
    explained = set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))
    given = set().union(*(reasons(module) for module in ROOTS))
    assert {"room", "rows in flight", "quota after branch 7", "the next step"} <= given
    assert explained == given


def test_whatever_a_turn_is_refused_for_comes_from_those_functions() -> None:
    """`_refuse` in `sched.step` is given what one of them returned, at once or by a name."""
    sources = ROOTS["step"] | ROOTS["admission"]
    for function in tree("step").body:
        names = {
            target.id
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and gives(node.value, sources)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if gives(node, {"_refuse"}):
                assert isinstance(node, ast.Call)
                why = node.args[-1]
                assert gives(why, sources) or (isinstance(why, ast.Name) and why.id in names), ast.unparse(node)


def gives(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
