"""The page of the command line: every command with its arguments and options, read from the typer app."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from agentspeed.cli.app import app, root
from agentspeed.cli.replay import EXIT_DIFFERS
from agentspeed.cli.statuses import EXIT_BUG, EXIT_REFUSED
from agentspeed.cli.top import EXIT_GONE

STATUSES = {
    0: "done; a chat or a watch that you ended",
    EXIT_DIFFERS: "`replay` alone: the replay differs from the recorded run",
    EXIT_REFUSED: "refused, with a sentence on stderr: a wrong command line, or what is raised as `InputError` or "
    "`WorldError` ([errors](errors.md))",
    EXIT_GONE: "`top` alone: every engine that was watched has ended",
    EXIT_BUG: "a bug of agentspeed (`InternalError`)",
    130: "interrupted by Ctrl-C, where it has no other meaning",
}
"""What each exit status says."""


def page(made: typer.Typer = app, above: Callable[..., object] = root) -> str:
    """Every command, in the order of `--help`, below what the command takes without one."""
    lines = ["# Command line", "", str(made.info.help).split("\n\n")[0], "", *_table(above), ""]
    lines += ["| exit status | meaning |", "|---|---|"]
    lines += [f"| {number} | {what} |" for number, what in STATUSES.items()]
    lines += ["", "`bench` ends with the status of its benchmark.", ""]
    for command in made.registered_commands:
        call = command.callback
        if call is None:
            raise LookupError("a command without a function")
        name = command.name or call.__name__.replace("_", "-")
        lines += [f"## `agentspeed {name}`", "", "```text", _usage(name, call), "```", ""]
        lines += [*_told(call), *_table(call), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _told(call: Callable[..., object]) -> Iterator[str]:
    """The docstring; its examples as code."""
    for part in (inspect.getdoc(call) or "").split("\n\n"):
        if part.startswith("Example:"):
            examples = [line.removeprefix("Example:").strip() for line in part.splitlines()]
            yield from ("```console", *(f"$ {example}" for example in examples), "```", "")
        else:
            yield from (part, "")


def _parameters(call: Callable[..., object]) -> Iterator[tuple[str, Any, ArgumentInfo | OptionInfo, object]]:
    """Name, type, what typer is told of it, default."""
    hints = get_type_hints(call, include_extras=True)
    for name, parameter in inspect.signature(call).parameters.items():
        kind, *notes = get_args(hints[name])
        yield name, kind, next(note for note in notes if isinstance(note, ArgumentInfo | OptionInfo)), parameter.default


def _usage(name: str, call: Callable[..., object]) -> str:
    words = ["agentspeed", name]
    parameters = list(_parameters(call))
    if any(isinstance(told, OptionInfo) for _, _, told, _ in parameters):
        words.append("[OPTIONS]")
    for argument, kind, told, default in parameters:
        if isinstance(told, ArgumentInfo):
            word = argument.upper() + ("..." if _is_list(kind) else "")
            words.append(word if default is inspect.Parameter.empty else f"[{word}]")
    return " ".join(words)


def _table(call: Callable[..., object]) -> list[str]:
    rows = [
        f"| {_shown(name, kind, told)} | {_default(default)} | {_said(kind, told)} |"
        for name, kind, told, default in _parameters(call)
    ]
    return ["| | default | |", "|---|---|---|", *rows] if rows else []


def _shown(name: str, kind: Any, told: ArgumentInfo | OptionInfo) -> str:
    if isinstance(told, ArgumentInfo):
        return f"`{name.upper()}`"
    given = (told.default, *(told.param_decls or ()))  # with `Annotated` the first stands in the default's place
    flags = [flag for flag in given if isinstance(flag, str) and flag.startswith("-")]
    flags = flags or [f"--{name.replace('_', '-')}"]
    value = "" if kind is bool else f" {_kind(kind).upper()}"
    return f"`{', '.join(flags)}{value}`"


def _said(kind: Any, told: ArgumentInfo | OptionInfo) -> str:
    """What it is for, after the words that it may be; the bounds of an option whose name says all."""
    text = told.help or ("" if told.min is None else f"At least {told.min:g}.")
    one = _whole(kind)
    if get_origin(one) is Literal:
        *words, last = get_args(one)
        text = f"{', '.join(words)} or {last}. {text}"
    return " ".join(text.split())


def _kind(kind: Any) -> str:
    one = _whole(kind)
    if get_origin(one) is Literal:
        return "word"
    return {"str": "text", "float": "number", "int": "number"}.get(one.__name__, one.__name__)


def _whole(kind: Any) -> Any:
    """`Path | None` is a path."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return next(one for one in get_args(kind) if one is not type(None))


def _is_list(kind: Any) -> bool:
    return any(get_origin(one) is list for one in (kind, *get_args(kind)))


def _default(default: object) -> str:
    unsaid = any(default is nothing for nothing in (None, False, inspect.Parameter.empty))
    return "" if unsaid else f"`{default}`"
