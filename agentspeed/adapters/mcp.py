"""Tools of an MCP server as a session's own: `tools=await tools_from_mcp(client)`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, final

import anyio
from mcp import Client, MCPError
from mcp_types import (
    AudioContent,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)
from mcp_types import Tool as ServerTool

from agentspeed.errors import InvalidRequest, ToolFailed
from agentspeed.tools import NeedsApproval, OnError, Tool, ToolContext, content_of, declared_tool

_PAGES: Final = 1000
"""More than that a listing does not have: it goes in a circle."""
_ODD: Final = re.compile(r"[^A-Za-z0-9_-]")
_NAME_LENGTH: Final = 64
_CONTEXT: Final = "the context"
"""The keyword of a call's `ToolContext`: a server that has a parameter of this name would lose it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a server says while a tool runs. `total`: what `done` will have come to, if the server knows."""

    tool: str
    done: float
    total: float | None
    message: str | None


OnProgress: TypeAlias = Callable[[Progress], Awaitable[None] | None]


async def tools_from_mcp(
    client: Client,
    *,
    names: Iterable[str] | None = None,
    prefix: str = "",
    timeout: float | None = None,
    on_error: OnError = "return",
    needs_approval: bool | Callable[[ServerTool], NeedsApproval] = False,
    on_progress: OnProgress | None = None,
    retries: int = 0,
) -> list[Tool]:
    """The tools that the server of an entered `mcp.Client` lists, in its order; `names` picks some of them.

    A model calls a tool by the server's name with `prefix` before it, where characters that a name cannot have are "_".
    Arguments are kept to the server's schema by the grammar. A result's parts are one text, what is no text is named
    by its kind and size, and an error of the tool, of the server or of the connection is the tool's error. `timeout`
    (seconds) and the end of a run cancel the call on the server. `needs_approval` is asked about each definition, and
    may answer with a function of the arguments; a definition's hints are the server's word only. `retries`: how often a
    call that failed is made again; for tools that may run twice.

    Raises `InvalidRequest` for names that the server does not have, for one that two tools would share, and for a
    schema that no grammar can hold; what `client.list_tools` raises passes."""
    listed = {tool.name: tool for tool in await _listed(client)}
    wanted = list(listed) if names is None else list(names)
    if unknown := [name for name in wanted if name not in listed]:
        raise InvalidRequest(
            f"The server has no tools {', '.join(unknown)}.", remedy=f"It has: {', '.join(listed) or 'none'}."
        )
    made: dict[str, Tool] = {}
    for name in wanted:
        tool = _tool(client, listed[name], prefix, on_progress)
        if tool.name in made:
            raise InvalidRequest(
                f"Two tools would be named {tool.name!r}.", remedy="Pick one of them with names=, or give a prefix=."
            )
        approval = _approval(needs_approval, listed[name])
        made[tool.name] = replace(tool, timeout=timeout, on_error=on_error, needs_approval=approval, retries=retries)
    return list(made.values())


async def _listed(client: Client) -> list[ServerTool]:
    found: list[ServerTool] = []
    cursor: str | None = None
    for _ in range(_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return found
    raise InvalidRequest(f"The server's list of tools has no end: {_PAGES} pages were read.")


def _tool(client: Client, listed: ServerTool, prefix: str, on_progress: OnProgress | None) -> Tool:
    name = _ODD.sub("_", f"{prefix}{listed.name}")[:_NAME_LENGTH]
    if name[:1] in "-0123456789":
        name = f"_{name}"[:_NAME_LENGTH]

    async def call(**arguments: Any) -> str:
        context: ToolContext[Any] | None = arguments.pop(_CONTEXT)

        async def told(progress: float, total: float | None, message: str | None) -> None:
            if context is not None:
                context.report(progress, total, message or "")
            if on_progress is not None:
                answer = on_progress(Progress(tool=name, done=progress, total=total, message=message))
                if inspect.isawaitable(answer):
                    await answer

        try:
            result = await client.call_tool(listed.name, arguments, progress_callback=told)
        except MCPError as error:
            raise ToolFailed(f"the server refused the call: {error.message}", tool=name) from error
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream) as error:
            raise ToolFailed("the connection to the server is gone", tool=name) from error
        text = text_of(result)
        if result.is_error:
            raise ToolFailed(text or "the server says no more than that it failed", tool=name)
        return text

    definition = {"name": name, "description": listed.description or "", "parameters": listed.input_schema}
    try:
        return replace(declared_tool(definition, call), context_parameter=_CONTEXT)
    except TypeError as error:
        raise InvalidRequest(str(error), remedy="Name the tools that you want with names=.") from error


def _approval(given: bool | Callable[[ServerTool], NeedsApproval], listed: ServerTool) -> NeedsApproval:
    return given if isinstance(given, bool) else given(listed)


def text_of(result: CallToolResult) -> str:
    """A result as a model reads it: a line for each part; the structured value where there are no parts."""
    parts = [_part(block) for block in result.content]
    if not parts and result.structured_content is not None:
        return content_of(result.structured_content)
    return "\n".join(parts)


def _part(block: ContentBlock) -> str:
    match block:
        case TextContent(text=text):
            return text
        case ImageContent(mime_type=kind, data=data) | AudioContent(mime_type=kind, data=data):
            return f"({block.type} {kind}, {len(data) * 3 // 4} bytes, which this model cannot read)"
        case ResourceLink(uri=uri, name=name, description=description):
            return f"(resource {name}: {uri}{f', {description}' if description else ''})"
        case EmbeddedResource(resource=TextResourceContents(uri=uri, text=text)):
            return f"(resource {uri})\n{text}"
        case EmbeddedResource(resource=resource):
            return (
                f"(resource {resource.uri}, {resource.mime_type or 'of no known kind'}, which this model cannot read)"
            )
