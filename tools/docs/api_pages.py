"""The API pages of docs/reference: every public name with its signature and its docstring, read from the source."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

_WIDTH = 100
_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
_INHERITED = {
    "EngineHandle": "agentspeed._core.engine_handle",
    "SessionValues": "agentspeed.session_values",
}
"""Bases of public classes that nobody names, and their modules: what is public of them is the class's."""
_INTERNAL = ("over", "shared", "codec", "link", "connected_socket")
"""Members of these bases that are no one's but the SDK's."""
_MADE_ELSEWHERE = ("Turn", "RunStream", "Stream", "Forks", "Pending")
"""Public classes that users are given and never make."""
_Definition: TypeAlias = _Function | ast.ClassDef | ast.AnnAssign | ast.Assign


def page(name: str, others: dict[str, str], met: dict[str, str]) -> str:
    """One module: its docstring, then each name of `__all__`. `others`: modules that have a page elsewhere. `met`:
    names that users meet in signatures and never import, with the modules they are in."""
    module = importlib.import_module(name)
    lines = [f"# `{name}`", "", inspect.getdoc(module) or "", ""]
    for public in public_names(module):
        value = getattr(module, public)
        if isinstance(value, ModuleType):
            lines += [f"## `{public}`", "", f"A module: [{value.__name__}]({others[value.__name__]}).", ""]
        else:
            lines += _entry(public, *defined(name, public))
    for public, home in met.items():
        lines += _entry(public, *defined(home, public))
    return "\n".join(lines).rstrip() + "\n"


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or without it the public classes, functions and aliases that the module defines itself."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("__")]
    return [name for node in _tree(module.__name__).body for name in _names(node) if not name.startswith("_")]


def defined(module: str, name: str) -> tuple[_Definition, str]:
    """The definition of a name and its docstring, followed through re-exports."""
    tree = _tree(module)
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, _Definition) and name in _names(node) and not _is_overload(node):
            return node, _doc_of(node, after)
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module is not None)
    for imported in imports:
        for alias in imported.names:
            if (alias.asname or alias.name) == name:
                return defined(str(imported.module), alias.name)
    raise LookupError(f"{module}.{name} is public and nowhere defined")


# ---- reading ------------------------------------------------------------------------------------------------------
@lru_cache
def _tree(module: str) -> ast.Module:
    path = importlib.import_module(module).__file__
    if path is None:
        raise LookupError(f"{module} has no file")
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.AnnAssign(target=ast.Name() as target):
            return [target.id]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case _:
            return []


def _is_overload(node: ast.stmt) -> bool:
    return isinstance(node, _Function) and "overload" in _decorators(node)


def _decorators(node: _Function | ast.ClassDef) -> set[str]:
    return {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}


def _doc_of(node: ast.stmt, after: ast.stmt | None) -> str:
    """A definition's docstring; for an assignment the string that follows it."""
    if isinstance(node, _Function | ast.ClassDef):
        return ast.get_docstring(node) or ""
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
        return inspect.cleandoc(after.value.value)
    return ""


# ---- writing ------------------------------------------------------------------------------------------------------
def _entry(name: str, node: _Definition, doc: str) -> Iterator[str]:
    yield from (f"## `{name}`", "")
    match node:
        case ast.ClassDef():
            yield from _class(node, doc)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield from _block(_signature(node), doc)
        case _:
            yield from _block(_assigned(node), doc)


def _class(node: ast.ClassDef, doc: str) -> Iterator[str]:
    bases = [ast.unparse(base) for base in node.bases if "Struct" not in ast.unparse(base)]
    body = [*node.body]
    for name in [name for name in bases if name in _INHERITED]:
        base, _ = defined(_INHERITED[name], name)
        assert isinstance(base, ast.ClassDef)
        body += [item for item in base.body if not isinstance(item, _Function) or item.name not in _INTERNAL]
        bases = []
    maker = next((item for item in body if isinstance(item, _Function) and item.name == "__init__"), None)
    if maker is not None and node.name not in _MADE_ELSEWHERE:
        head = _called(f"class {node.name}", _parameters(maker.args)[1:], "")
    else:
        head = f"class {node.name}" + (f"({', '.join(bases)})" if bases else "")
    yield from _block(head, doc)
    yield from _fields(node)
    for item in body:
        if isinstance(item, _Function) and not item.name.startswith("_") and not _is_overload(item):
            static = "staticmethod" in _decorators(item)
            yield from (f"### `{node.name}.{item.name}`", "")
            yield from _block(_member(item, static=static), ast.get_docstring(item) or "")


def _fields(node: ast.ClassDef) -> Iterator[str]:
    listed = False
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and not _names(item)[0].startswith("_"):
            doc = " ".join(_doc_of(item, after).split())
            yield f"- `{_assigned(item)}`" + (f": {doc}" if doc else "")
            listed = True
    if listed:
        yield ""


def _member(node: _Function, *, static: bool) -> str:
    decorators = _decorators(node)
    if "property" in decorators:
        return f"{node.name}: {ast.unparse(node.returns)}" if node.returns is not None else node.name
    text = _signature(node, bound=not static)
    return f"@classmethod\n{text}" if "classmethod" in decorators else text


def _signature(node: _Function, *, bound: bool = False) -> str:
    """As it is called: without `self`."""
    head = f"async def {node.name}" if isinstance(node, ast.AsyncFunctionDef) else f"def {node.name}"
    returns = "None" if node.returns is None else ast.unparse(node.returns)
    return _called(head, _parameters(node.args)[1 if bound else 0 :], f" -> {returns}")


def _called(head: str, parameters: list[str], tail: str) -> str:
    """On one line, or one parameter a line when that is long."""
    text = f"{head}({', '.join(parameters)}){tail}"
    if len(text) <= _WIDTH:
        return text
    return f"{head}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){tail}"


def _parameters(arguments: ast.arguments) -> list[str]:
    """Each as it is written, with the marks `/` and `*` between the kinds."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(arguments.defaults)), *arguments.defaults]
    parameters = [_parameter(one, default) for one, default in zip(plain, defaults, strict=True)]
    if arguments.posonlyargs:
        parameters.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg is not None:
        parameters.append(f"*{_parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parameters.append("*")
    parameters += [
        _parameter(one, default) for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        parameters.append(f"**{_parameter(arguments.kwarg, None)}")
    return parameters


def _parameter(one: ast.arg, default: ast.expr | None) -> str:
    if one.annotation is None:
        return one.arg if default is None else f"{one.arg}={ast.unparse(default)}"
    text = f"{one.arg}: {ast.unparse(one.annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def _assigned(node: ast.AnnAssign | ast.Assign) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 2 * _WIDTH else f"{text[: 2 * _WIDTH]} ..."


def _block(code: str, doc: str) -> Iterator[str]:
    yield from ("```py", code, "```", "")
    if doc:
        yield from (doc, "")
