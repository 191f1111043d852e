"""Tools of an MCP server in this process, on every event loop: schemas, results, errors, progress, cancelling, time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from pydantic import Field

_ = pytest.importorskip("mcp", reason="install agentspeed[mcp]")

import anyio  # noqa: E402
from mcp import Client  # noqa: E402
from mcp.server.mcpserver import Context, Image, MCPServer  # noqa: E402
from mcp.server.mcpserver.exceptions import ToolError as ServerToolError  # noqa: E402

from agentspeed.adapters.mcp import Progress, tools_from_mcp  # noqa: E402
from agentspeed.errors import InvalidRequest, ToolFailed  # noqa: E402
from agentspeed.events import ToolProgress  # noqa: E402
from agentspeed.messages import ToolCall, ToolMessage  # noqa: E402
from agentspeed.testing import ScriptedEngine, tool_call  # noqa: E402
from agentspeed.tools import ToolBatch, ToolResult  # noqa: E402

pytestmark = pytest.mark.anyio


class _Served:
    """The server's side, and what it saw."""

    def __init__(self) -> None:
        self.server = MCPServer("tests")
        self.began = anyio.Event()
        self.cancelled = anyio.Event()
        served = self

        @self.server.tool()
        def add(a: int, b: int) -> int:
            """Adds two numbers."""
            return a + b

        @self.server.tool(name="files.list/all")
        def files() -> Any:
            """Lists files."""
            return ["a.txt", "b.txt", Image(data=b"\x89PNG" * 3, format="png")]

        @self.server.tool()
        def fail(why: str) -> str:
            """Fails."""
            raise ServerToolError(why)

        @self.server.tool()
        async def slow(context: Context) -> str:
            """Takes long."""
            served.began.set()
            try:
                await context.report_progress(1, 3, "one of three")
                await anyio.sleep(60)
            except anyio.get_cancelled_exc_class():
                served.cancelled.set()
                raise
            return "done"


@asynccontextmanager
async def _served(**options: Any) -> AsyncIterator[tuple[_Served, dict[str, Any]]]:
    served = _Served()
    async with Client(served.server) as client:
        yield served, {tool.name: tool for tool in await tools_from_mcp(client, **options)}


async def _run(tools: dict[str, Any], name: str, arguments: str) -> ToolResult:
    batch = ToolBatch(list(tools.values()), [ToolCall(id="1", name=name, arguments=arguments)])
    await batch.run()
    return batch.results()[0]


async def test_an_agent_calls_a_servers_tool_and_reads_its_result(anyio_backend: object) -> None:
    async with _served(names=["add"]) as (_, tools):
        script = [tool_call("add", a=17, b=25), "It is 42."]
        async with ScriptedEngine(script) as engine, engine.session(tools=list(tools.values())) as session:
            result = await session.run("What is 17 plus 25?")
            assert result.text == "It is 42."
            assert [one.text for one in session.messages if isinstance(one, ToolMessage)] == ["42"]


async def test_what_a_model_is_told_is_what_the_server_says(anyio_backend: object) -> None:
    async with _served(prefix="my-") as (_, tools):
        assert list(tools) == ["my-add", "my-files_list_all", "my-fail", "my-slow"]
        add = tools["my-add"]
        assert add.description == "Adds two numbers."
        assert set(add.schema["properties"]) == {"a", "b"}


async def test_parts_of_a_result_are_lines_and_what_is_no_text_is_named(anyio_backend: object) -> None:
    async with _served() as (_, tools):
        result = await _run(tools, "files_list_all", "{}")
        assert result.ok
        assert result.content.splitlines() == [
            "a.txt",
            "b.txt",
            "(image image/png, 12 bytes, which this model cannot read)",
        ]


async def test_an_error_of_the_servers_tool_is_the_tools_error(anyio_backend: object) -> None:
    async with _served() as (_, tools):
        result = await _run(tools, "fail", '{"why": "no such file"}')
        assert not result.ok
        assert result.content.endswith("no such file")
        assert "ToolFailed" not in result.content
        assert isinstance(result.error, ToolFailed)


async def test_arguments_that_the_server_refuses_are_an_error_and_the_next_call_works(anyio_backend: object) -> None:
    async with _served() as (_, tools):
        assert not (await _run(tools, "add", '{"a": "many"}')).ok
        assert (await _run(tools, "add", '{"a": 1, "b": 2}')).content == "3"


async def test_progress_is_told_while_the_tool_runs(anyio_backend: object) -> None:
    told: list[Progress] = []
    arrived = anyio.Event()

    async def on_progress(progress: Progress) -> None:
        told.append(progress)
        arrived.set()

    async with _served(on_progress=on_progress) as (_, tools), anyio.create_task_group() as group:
        _ = group.start_soon(_run, tools, "slow", "{}")
        with anyio.fail_after(10):
            await arrived.wait()
        group.cancel_scope.cancel()
    assert told == [Progress(tool="slow", done=1, total=3, message="one of three")]


async def test_progress_is_an_event_of_the_run(anyio_backend: object) -> None:
    server, seen = MCPServer("tests"), []

    @server.tool()
    async def walk(context: Context) -> str:
        """Walks."""
        await context.report_progress(1, 3, "one of three")
        return "there"

    async with Client(server) as client:
        tools = await tools_from_mcp(client)
        async with ScriptedEngine([tool_call("walk"), "Done."]) as engine, engine.session(tools=tools) as session:
            _ = await session.run("Go.", on_event=seen.append)
    told = [(one.call.name, one.done, one.total, one.message) for one in seen if isinstance(one, ToolProgress)]
    assert told == [("walk", 1, 3, "one of three")]


async def test_cancelling_a_call_cancels_it_on_the_server(anyio_backend: object) -> None:
    async with _served() as (served, tools):
        async with anyio.create_task_group() as group:
            _ = group.start_soon(_run, tools, "slow", "{}")
            await served.began.wait()
            group.cancel_scope.cancel()
        with anyio.fail_after(10):
            await served.cancelled.wait()
        assert (await _run(tools, "add", '{"a": 1, "b": 2}')).content == "3"


async def test_a_call_that_takes_too_long_ends_here_and_on_the_server(anyio_backend: object) -> None:
    async with _served(timeout=0.2) as (served, tools):
        result = await _run(tools, "slow", "{}")
        assert not result.ok
        assert "0.2 s" in result.content
        with anyio.fail_after(10):
            await served.cancelled.wait()


async def test_a_server_that_is_gone_is_a_tool_error(anyio_backend: object) -> None:
    async with _served() as (_, tools):
        kept = tools
    result = await _run(kept, "add", '{"a": 1, "b": 2}')
    assert not result.ok


async def test_names_that_the_server_does_not_have_are_refused(anyio_backend: object) -> None:
    async with Client(_Served().server) as client:
        with pytest.raises(InvalidRequest, match="no tools multiply") as caught:
            _ = await tools_from_mcp(client, names=["add", "multiply"])
    assert "add, " in str(caught.value)


async def test_two_tools_under_one_name_are_refused(anyio_backend: object) -> None:
    server = MCPServer("tests")
    for name in ("a.b", "a/b"):
        server.add_tool(lambda: "x", name=name, description="One.")
    async with Client(server) as client:
        with pytest.raises(InvalidRequest, match="'a_b'"):
            _ = await tools_from_mcp(client)
        (tool,) = await tools_from_mcp(client, names=["a/b"])
        assert tool.name == "a_b"


async def test_a_schema_that_no_grammar_holds_is_refused_by_name_and_the_others_can_be_had(
    anyio_backend: object,
) -> None:
    server = MCPServer("tests")

    def odd(value: Annotated[int, Field(json_schema_extra={"$dynamicRef": "#other"})]) -> str:
        return "x"

    def plain(value: int) -> str:
        return "x"

    server.add_tool(odd, description="Takes what another schema says.")
    server.add_tool(plain, description="Takes a number.")
    async with Client(server) as client:
        with pytest.raises(InvalidRequest, match="odd"):
            _ = await tools_from_mcp(client)
        assert [tool.name for tool in await tools_from_mcp(client, names=["plain"])] == ["plain"]


async def test_approval_may_depend_on_what_the_server_says_of_a_tool(anyio_backend: object) -> None:
    async with _served(needs_approval=lambda listed: listed.name != "add") as (_, tools):
        assert (await _run(tools, "add", '{"a": 1, "b": 2}')).ok
        assert "not approved" in (await _run(tools, "fail", '{"why": "x"}')).content
