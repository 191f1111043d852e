"""Reads the Python file of `agentspeed chat --tools`: which of its functions become tools, and why others do not."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeGuard, final

from agentspeed import errors
from agentspeed.tools import Tool, tool, tools_from

_MODULE = "agentspeed_chat_tools"


@final
@dataclass(frozen=True, slots=True)
class ToolsFile:
    """What a file gives a chat."""

    tools: tuple[Tool, ...] = ()
    left_out: tuple[str, ...] = ()
    """A line for each public function that is no tool: its name, and why."""


def tools_of(path: Path) -> ToolsFile:
    """What the file made with `@tool`; where it made nothing with it, the public functions it defines, as far as their
    signatures can be told to a model. In their order.

    Raises `InvalidRequest` when the file cannot be loaded or no tool remains."""
    public = {name: item for name, item in vars(_loaded(path)).items() if not name.startswith("_")}
    functions = {name: item for name, item in public.items() if _is_own(item)}
    made = [item for item in public.values() if isinstance(item, Tool)]
    if made:
        left_out = [f"{name}: it has no @tool, and others in the file have" for name in functions]
    else:
        made, left_out = _made_of(functions)
    if not made:
        if not left_out:
            raise errors.InvalidRequest(f"{path} defines no public functions.", remedy="Write some with type hints.")
        raise errors.InvalidRequest(f"{path}: none of its functions can be a tool. " + " ".join(left_out))
    try:
        return ToolsFile(tools_from({id(item): item for item in made}.values()), tuple(left_out))
    except TypeError as error:  # a name used twice
        raise errors.InvalidRequest(f"{path}: {error}") from error


def _made_of(functions: dict[str, Callable[..., object]]) -> tuple[list[Tool], list[str]]:
    made: dict[Callable[..., object], Tool] = {}
    left_out: list[str] = []
    for name, function in functions.items():
        if function in made:
            continue
        try:
            made[function] = tool(function)
        except (TypeError, ValueError, NameError, AttributeError, SyntaxError) as error:  # the last three: of its hints
            left_out.append(f"{name}: {str(error).removeprefix(f'tool {function.__name__}(): ')}")
    return list(made.values()), left_out


def _is_own(item: object) -> TypeGuard[Callable[..., object]]:
    return inspect.isfunction(item) and item.__module__ == _MODULE


def _loaded(path: Path) -> ModuleType:
    if not path.is_file():
        raise errors.InvalidRequest(f"{path} is not a file.", remedy="Give a Python file with typed functions.")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise errors.InvalidRequest(f"{path} is not a Python file.", remedy="Give one whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except SystemExit as ended:
        raise errors.InvalidRequest(
            f"{path} cannot be loaded: it ends the program (SystemExit: {ended.code}).",
            remedy='Put what only a program does below `if __name__ == "__main__":`.',
        ) from ended
    except Exception as error:  # the user's own code: whatever it raises belongs into the sentence
        raise errors.InvalidRequest(
            f"{path} cannot be loaded: {type(error).__name__}: {error}",
            remedy=f"See that `{Path(sys.executable).name} {path}` runs.",
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have taken it off itself
            sys.path.remove(folder)
        sys.path.append(folder)  # for a tool that imports a neighbour when it is called; last, so that it hides nothing
    return module
