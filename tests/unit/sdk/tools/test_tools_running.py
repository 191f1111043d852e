"""Every call leaves a result: wrong arguments, denial, timeout, crash and cancellation included."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import sniffio
from pydantic import BaseModel, field_validator

from agentspeed.errors import BadArguments, ToolDenied, ToolFailed, ToolTimeout, UnknownTool
from agentspeed.messages import ToolCall
from agentspeed.tools import ToolBatch, ToolContext, declared_tool, execute, execution, tool

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def add(a: int, b: int = 10) -> int:
    return a + b


async def slow(seconds: float) -> str:
    await anyio.sleep(seconds)
    return f"slept {seconds}"


def crash(text: str) -> str:
    raise RuntimeError(text)


def call(name: str, arguments: str = "{}", number: int = 0) -> ToolCall:
    return ToolCall(id=f"c{number}", name=name, arguments=arguments)


async def test_these_tests_run_on_the_loop_they_name(anyio_backend: str) -> None:
    assert sniffio.current_async_library() == anyio_backend


async def test_a_sync_function_runs_and_its_own_default_holds() -> None:
    assert (await execute(tool(add), '{"a":1}')).content == "11"


async def test_an_async_function_is_awaited() -> None:
    assert (await execute(tool(slow), {"seconds": 0.0})).content == "slept 0.0"


@pytest.mark.parametrize("arguments", ['{"a":"x"}', '{"a":1,"c":2}', "{}", '{"a":', "[1]"])
async def test_wrong_arguments_are_told_to_the_model_and_nothing_runs(arguments: str) -> None:
    ran: list[int] = []

    def touch(a: int) -> None:
        ran.append(a)

    result = await execute(tool(touch), arguments)
    assert isinstance(result.error, BadArguments)
    assert not result.ok
    assert result.content.startswith("error: touch: wrong arguments")
    assert ran == []


class Picky(BaseModel):
    a: int

    @field_validator("a")
    @classmethod
    def known(cls, value: int) -> int:
        return {1: 1}[value]


async def test_a_check_that_breaks_is_a_result_with_its_cause() -> None:
    def pick(one: Picky) -> int:
        return one.a

    assert (await execute(tool(pick), '{"one":{"a":1}}')).content == "1"
    result = await execute(tool(pick), '{"one":{"a":7}}')
    assert isinstance(result.error, ToolFailed)
    assert result.content == "error: pick: its arguments could not be checked: KeyError: 7"


async def test_a_timeout_ends_a_slow_tool_and_says_so() -> None:
    result = await execute(tool(timeout=0.05)(slow), {"seconds": 10})
    assert isinstance(result.error, ToolTimeout)
    assert "0.05 s" in result.content


async def test_a_timeout_does_not_wait_for_a_sync_function() -> None:
    def nap(seconds: float) -> None:
        time.sleep(seconds)

    with anyio.fail_after(0.9):
        result = await execute(tool(timeout=0.05)(nap), {"seconds": 1.0})
    assert isinstance(result.error, ToolTimeout)


async def test_a_crash_is_a_result_with_its_cause() -> None:
    result = await execute(tool(crash), {"text": "no disk"})
    assert isinstance(result.error, ToolFailed)
    assert isinstance(result.error.__cause__, RuntimeError)
    assert result.content == "error: crash: RuntimeError: no disk"


async def test_a_result_that_json_cannot_carry_is_a_failure() -> None:
    def thing() -> object:
        return object()

    assert isinstance((await execute(tool(thing), "{}")).error, ToolFailed)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (math.nan, '"NaN"'),
        ({"high": math.inf, "low": [-math.inf]}, '{"high":"Infinity","low":["-Infinity"]}'),
        (1.5, "1.5"),
    ],
)
async def test_a_number_that_json_does_not_have_reaches_the_model_as_a_text(value: object, told: str) -> None:
    def measure() -> object:
        return value

    result = await execute(tool(measure), "{}")
    assert result.ok
    assert result.content == told
    _ = json.loads(result.content, parse_constant=pytest.fail)


async def test_the_context_reaches_the_tool() -> None:
    def who(context: ToolContext[str]) -> str:
        return f"{context.call_id} {context.tool} {context.data}"

    batch = ToolBatch([tool(who)], [call("who", number=7)], data="mine")
    await batch.run()
    assert batch.results()[0].content == "c7 who mine"


@pytest.mark.parametrize("needs", [True, lambda _: True])
async def test_a_call_that_needs_approval_is_denied_when_nobody_is_asked(needs: Any) -> None:
    result = await execute(tool(needs_approval=needs)(add), '{"a":1}')
    assert isinstance(result.error, ToolDenied)


async def test_a_predicate_sees_the_checked_arguments() -> None:
    def big(arguments: Mapping[str, Any]) -> bool:
        return bool(arguments["a"] > 5)

    careful = tool(needs_approval=big)(add)
    assert (await execute(careful, '{"a":1}')).ok
    assert not (await execute(careful, '{"a":6}')).ok


async def test_a_predicate_sees_the_defaults_too_and_the_function_gets_only_what_was_given() -> None:
    seen: list[Mapping[str, Any]] = []

    def note(arguments: Mapping[str, Any]) -> bool:
        seen.append(arguments)
        return bool(arguments.get("recursive", False))

    def remove(path: str, recursive: bool = True, copy: list[int] = []) -> str:  # noqa: B006
        copy.append(1)
        return f"{path} {recursive} {len(copy)}"

    careful = tool(needs_approval=note)(remove)
    assert isinstance((await execute(careful, '{"path":"x"}')).error, ToolDenied)
    assert (await execute(careful, '{"path":"x","recursive":false}')).content == "x False 1"
    assert (await execute(careful, '{"path":"x","recursive":false}')).content == "x False 2"  # the function's own list
    assert seen[0] == {"path": "x", "recursive": True, "copy": []}


async def test_a_predicate_of_a_declared_tool_sees_the_defaults_of_its_schema() -> None:
    seen: list[Mapping[str, Any]] = []

    def note(arguments: Mapping[str, Any]) -> bool:
        seen.append(arguments)
        return bool(arguments["recursive"])

    def far(**arguments: object) -> str:
        return f"{arguments}"

    flag = {"type": "boolean", "default": True}
    parameters = {"type": "object", "properties": {"path": {"type": "string"}, "recursive": flag}}
    careful = dataclasses.replace(declared_tool({"name": "far", "parameters": parameters}, far), needs_approval=note)
    assert isinstance((await execute(careful, '{"path":"x"}')).error, ToolDenied)
    assert (await execute(careful, '{"path":"x","recursive":false}')).content == "{'path': 'x', 'recursive': False}"
    assert seen == [{"recursive": True, "path": "x"}, {"recursive": False, "path": "x"}]


async def test_an_approver_is_asked_and_only_true_grants() -> None:
    asked: list[str] = []

    async def approve(asked_for: ToolCall) -> bool:
        asked.append(asked_for.arguments)
        return asked_for.arguments == '{"a":1,"b":10}'

    careful = tool(needs_approval=True)(add)
    assert (await execute(careful, '{"a":1}', approve=approve)).ok
    assert not (await execute(careful, '{"a":2}', approve=approve)).ok
    assert asked == ['{"a":1,"b":10}', '{"a":2,"b":10}']


async def test_approval_fails_closed() -> None:
    def broken(_: Any) -> bool:
        raise KeyError("oops")

    def yes(_: ToolCall) -> Any:
        return "yes"

    assert isinstance((await execute(tool(needs_approval=broken)(add), '{"a":1}')).error, ToolDenied)
    assert isinstance((await execute(tool(needs_approval=True)(add), '{"a":1}', approve=broken)).error, ToolDenied)
    assert isinstance((await execute(tool(needs_approval=True)(add), '{"a":1}', approve=yes)).error, ToolDenied)


async def test_unparsable_arguments_never_reach_the_approver() -> None:
    asked: list[ToolCall] = []

    def approve(asked_for: ToolCall) -> bool:
        asked.append(asked_for)
        return True

    _ = await execute(tool(needs_approval=True)(add), "{", approve=approve)
    assert asked == []


async def test_calls_run_at_once_and_results_come_in_call_order() -> None:
    calls = [call("slow", '{"seconds":0.2}'), call("crash", '{"text":"x"}', 1), call("slow", '{"seconds":0.1}', 2)]
    arrived: list[int] = []
    batch = ToolBatch([tool(slow), tool(crash)], calls, arrived=lambda index, _: arrived.append(index))
    await batch.run()
    assert arrived == [1, 2, 0]
    assert [result.content for result in batch.results()] == [
        "slept 0.2",
        "error: crash: RuntimeError: x",
        "slept 0.1",
    ]


async def test_a_declared_tool_is_called_by_name() -> None:
    def call_it(**arguments: object) -> str:
        return f"{arguments}"

    parameters = {"type": "object", "properties": {"a": {"type": "null"}}}
    definition = {"name": "far", "description": "", "parameters": parameters}
    assert (await execute(declared_tool(definition, call_it), '{"a":1}')).content == "{'a': 1}"
    anything = declared_tool({"name": "far", "parameters": {"type": "object", "properties": {"a": {}}}}, call_it)
    assert (await execute(anything, '{"a":[{}]}')).content == "{'a': [{}]}"
    with pytest.raises(TypeError, match="needs a 'name'"):
        _ = declared_tool({"description": "x"}, call_it)


async def test_an_unknown_tool_is_a_result_that_names_the_tools() -> None:
    batch = ToolBatch([tool(add)], [call("subtract")])
    await batch.run()
    assert isinstance(batch.results()[0].error, UnknownTool)
    assert batch.results()[0].content == "error: there is no tool 'subtract'; the tools are: add"


async def test_a_cancelled_batch_has_a_result_for_every_call() -> None:
    calls = [call("slow", '{"seconds":9}'), call("add", '{"a":1}', 1)]
    with anyio.CancelScope() as scope:
        batch = ToolBatch([tool(slow), tool(add)], calls, arrived=lambda *_: scope.cancel())
        await batch.run()
    assert scope.cancelled_caught
    assert [result.content for result in batch.results()] == ["error: cancelled before it finished", "11"]


async def test_on_error_raise_is_kept_for_the_caller_after_all_results_are_there() -> None:
    calls = [call("crash", '{"text":"x"}'), call("add", '{"a":1}')]
    batch = ToolBatch([tool(on_error="raise")(crash), tool(add)], calls)
    await batch.run()
    assert isinstance(batch.to_raise(), ToolFailed)
    assert batch.results()[1].ok


# ---- a cancellation that nobody asked for ---------------------------------------------------------------------------
async def stray() -> str:
    """Raises the cancellation of something that is over."""
    kept: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.lowlevel.checkpoint()
        except anyio.get_cancelled_exc_class() as error:
            kept.append(error)
            raise
    raise kept[0]


def raises_asyncios() -> None:
    raise asyncio.CancelledError("an event loop of its own")


@pytest.mark.parametrize("culprit", [stray, raises_asyncios])
async def test_a_cancellation_that_nobody_asked_for_is_a_failure_of_that_tool_alone(culprit: Any) -> None:
    batch = ToolBatch([tool(slow), tool(name="bad")(culprit)], [call("slow", '{"seconds":0.2}'), call("bad", number=1)])
    await batch.run()
    good, bad = batch.results()
    assert good.content == "slept 0.2"
    assert isinstance(bad.error, ToolFailed)
    assert bad.content == "error: bad: RuntimeError: what it waited for was cancelled"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_tool_that_awaits_a_cancelled_task_fails_and_the_others_go_on() -> None:
    async def waits() -> None:
        task = asyncio.ensure_future(asyncio.sleep(10))
        _ = task.cancel()
        await task

    batch = ToolBatch([tool(slow), tool(waits)], [call("waits"), call("slow", '{"seconds":0.1}', 1)])
    await batch.run()
    assert [result.content for result in batch.results()] == [
        "error: waits: RuntimeError: what it waited for was cancelled",
        "slept 0.1",
    ]


async def test_an_approver_or_a_predicate_that_is_cancelled_denies() -> None:
    async def ask(_: Any) -> bool:
        _ = await stray()
        return True

    for careful, approve in ((tool(needs_approval=ask)(add), None), (tool(needs_approval=True)(add), ask)):
        result = await execute(careful, '{"a":1}', approve=approve)
        assert isinstance(result.error, ToolDenied)


async def test_a_cancellation_of_the_scope_around_it_passes_through_a_tool_that_strays() -> None:
    async def strays_late() -> None:
        try:
            await anyio.sleep(10)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)

    batch = ToolBatch([tool(strays_late)], [call("strays_late")])
    with anyio.move_on_after(0.05) as scope:
        await batch.run()
    assert scope.cancelled_caught
    assert batch.results()[0].content == "error: cancelled before it finished"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancellation_of_asyncios_own_passes() -> None:
    batch = ToolBatch([tool(slow)], [call("slow", '{"seconds":9}')])
    for work in (batch.run, lambda: execute(tool(slow), {"seconds": 9.0})):
        running = asyncio.ensure_future(work())  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        _ = running.cancel()
        with pytest.raises(asyncio.CancelledError):
            _ = await running
    assert batch.results()[0].content == "error: cancelled before it finished"


async def test_a_timeout_is_no_stray_cancellation() -> None:
    result = await execute(tool(timeout=0.05)(slow), {"seconds": 9.0})
    assert isinstance(result.error, ToolTimeout)


async def test_the_words_of_an_error_that_is_ours_reach_the_model_without_its_class() -> None:
    def lookup() -> str:
        raise ToolFailed("the server has no such file")

    assert (await execute(tool(lookup), "{}")).content == "error: lookup: the server has no such file"


@pytest.mark.parametrize(("fails", "ok", "calls"), [(2, True, 3), (3, False, 3)])
async def test_a_tool_that_raises_is_called_again_as_often_as_it_says(
    fails: int, ok: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_FIRST_WAIT", 0.01)
    seen: list[int] = []
    asked: list[str] = []

    def flaky(a: int) -> str:
        seen.append(a)
        if len(seen) <= fails:
            raise ConnectionError("try again")
        return "done"

    def approve(request: ToolCall) -> bool:
        asked.append(request.name)
        return True

    result = await execute(tool(retries=2, needs_approval=True)(flaky), '{"a":1}', approve=approve)
    assert (result.ok, seen, asked) == (ok, [1] * calls, ["flaky"])
    assert result.content == ("done" if ok else "error: flaky: ConnectionError: try again")


async def test_the_time_of_a_tool_is_of_all_its_attempts_and_wrong_arguments_are_not_tried_again() -> None:
    seen: list[int] = []

    def flaky(a: int) -> str:
        seen.append(a)
        raise ConnectionError("try again")

    made = tool(retries=9, timeout=0.4)(flaky)
    assert isinstance((await execute(made, '{"a":1}')).error, ToolTimeout)
    assert isinstance((await execute(made, '{"a":"x"}')).error, BadArguments)
    assert seen == [1]


@pytest.mark.parametrize("retries", [-1, 1.5, True])
def test_an_impossible_number_of_retries_is_refused_when_the_tool_is_made(retries: Any) -> None:
    with pytest.raises(ValueError, match="retries is"):
        _ = tool(retries=retries)(add)
