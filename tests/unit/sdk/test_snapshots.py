"""A snapshot has all of a session but rows, is read without its tools, and goes on when they fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from annotated_types import Ge, Le

from agentspeed import Sampling, Session, Tool, errors, tool
from agentspeed.engine import NANO
from agentspeed.snapshot import VERSION
from agentspeed.testing import ScriptedEngine, tool_call

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def adder(doc: str = "Add two numbers.", *, note: str = "the first", default: int = 0) -> Tool:
    def add(a: int, b: int = default) -> int:
        return a + b

    add.__annotations__["a"] = Annotated[int, note]
    add.__doc__ = doc
    return tool(add)


async def test_every_option_comes_back() -> None:
    given: dict[str, Any] = {
        "system": "You are brief.",
        "sampling": Sampling(
            temperature=0.5,
            top_k=7,
            top_p=0.9,
            min_p=0.1,
            frequency_penalty=0.5,
            presence_penalty=-0.5,
            repetition_penalty=1.1,
            logit_bias={3: -1.5},
        ),
        "private": True,
        "tenant": "acme",
        "seed": 5,
        "name": "mine",
        "max_tokens": 40,
        "timeout": 3.0,
        "record_logprobs": True,
        "reasoning": True,
        "history_reasoning": "keep",
        "template_variables": {"persona": "a pirate", "years": 10**30, "odd": [None, {"a": 1.5}]},
        "close_timeout": 2.0,
    }
    async with ScriptedEngine(["Hello."]) as engine:
        async with engine.session(**given) as s:
            _ = await s.generate("Hi.")
            data = await s.snapshot()
        async with Session.restore(data, engine.engine) as again:
            assert (again.id, again.system, again.messages, again.ids) == ("mine", "You are brief.", s.messages, s.ids)
            assert again.defaults == s.defaults
            assert again.trajectory() == s.trajectory()
            assert await again.snapshot() == data


async def test_results_that_had_arrived_are_not_made_again() -> None:
    ran: list[int] = []

    @tool
    def f(a: int) -> int:
        """Give it back."""
        ran.append(a)
        return a

    script = [tool_call("f", a=1) + tool_call("f", a=2), "Done."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[f]) as s:
        (first, _) = (await s.generate("Go.")).tool_calls
        async with s.tool_call(first) as pending:
            pending.result = "kept"
        async with Session.restore(await s.snapshot(), engine.engine, tools=[f]) as again:
            assert again.open_calls == s.open_calls
            result = await again.run()
        assert [message.text for message in result.tools] == ["kept", "2"] and ran == [2]


@pytest.mark.parametrize(
    "change", [lambda: adder("Adds two numbers."), lambda: adder(note="the second"), lambda: adder("")]
)
async def test_other_words_about_a_tool_do_no_harm(change: Callable[[], Tool]) -> None:
    async with ScriptedEngine([tool_call("add", a=1), "Done.", "More."]) as engine:
        async with engine.session(tools=[adder()]) as s:
            _ = await s.run("Go.")
            data = await s.snapshot()
        async with Session.restore(data, engine.engine, tools=[change()]) as again:
            assert (await again.run("Go on.")).text == "More."


async def test_it_is_read_without_its_tools_and_takes_no_turns() -> None:
    async with ScriptedEngine([tool_call("add", a=1), "Done.", "More."]) as engine:
        async with engine.session(tools=[adder()]) as s:
            _ = await s.run("Go.")
            data = await s.snapshot()
        again = Session.restore(data, engine.engine)
        assert again.messages == s.messages and again.state == "new"
        async with again:
            for turn in (again.generate("x"), again.run("x"), again.run()):
                with pytest.raises(errors.InvalidRequest, match=r"tools add, which were not given\. Give them to"):
                    _ = await turn
            assert again.messages == s.messages
            assert await again.snapshot() == data  # which still knows its tools
        async with Session.restore(data, engine.engine, tools=[adder()]) as whole:
            assert (await whole.generate("Go on.")).text == "More."


@tool
def other() -> str:
    """Other."""
    return ""


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ([adder(default=5)], "other parameters of the tools add"),
        ([adder(), other], "does not describe the tools other"),
    ],
)
async def test_tools_that_do_not_fit_are_refused(tools: list[Tool], why: str) -> None:
    async with ScriptedEngine(["Hello."]) as engine, engine.session(tools=[adder()]) as s:
        data = await s.snapshot()
        with pytest.raises(errors.InvalidRequest, match=why):
            _ = Session.restore(data, engine.engine, tools=tools)


async def test_another_tokenizer_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    _ = shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    same = tmp_path / "same"
    _ = shutil.copytree(folder, same)
    spec = json.loads((folder / "tokenizer.json").read_text())
    _ = (same / "tokenizer.json").write_text(json.dumps(spec, indent=1))  # written otherwise: the same ids
    letters = sorted(token for token in spec["model"]["vocab"] if len(token) == 1 and token.isalpha())
    vocabulary = spec["model"]["vocab"]
    vocabulary |= {letter: vocabulary[letters[place - 1]] for place, letter in enumerate(letters)}
    spec["model"]["vocab"] = {**vocabulary}
    _ = (folder / "tokenizer.json").write_text(json.dumps(spec))
    async with ScriptedEngine(["Hello."]) as engine, engine.session() as s:
        _ = await s.generate("Hi.")
        data = await s.snapshot()
    async with ScriptedEngine(["Hello."], model=same) as engine, Session.restore(data, engine.engine) as again:
        assert again.ids == s.ids
    async with ScriptedEngine(["Hello."], model=folder) as engine:
        again = Session.restore(data, engine.engine)
        assert again.messages == s.messages
        with pytest.raises(errors.InvalidRequest, match=r"another tokenizer .* Restore it on the model"):
            _ = await again.__aenter__()
        assert again.state == "closed" and engine.live_branches == 0


async def damaged(change: Callable[[dict[str, Any]], None]) -> bytes:
    async with ScriptedEngine(["Hello."]) as engine, engine.session() as s:
        _ = await s.generate("Hi.")
        _ = await s.mark("here")
        found = msgspec.msgpack.decode(await s.snapshot())
    change(found)
    return msgspec.msgpack.encode(found)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda found: found.update(version=VERSION + 1), f"has version {VERSION + 1}; this agentspeed reads version"),
        (lambda found: found.update(version=1), "has version 1;"),
        (lambda found: found.pop("version"), "no session snapshot"),
        (lambda found: found.update(tools="{}"), "no session snapshot"),
        (lambda found: found.pop("ids"), "no session snapshot"),
        (lambda found: found.update(ids=found["ids"][:-4]), "different lengths"),
        (lambda found: found.update(ids=found["ids"][:-1]), "no session snapshot"),
        (lambda found: found.update(open_at=10_000), "places that its log does not have"),
        (lambda found: found["marks"][0].__setitem__(1, 10_000), "places that its log does not have"),
        (lambda found: found["spans"][0].__setitem__(1, -1), "places that its log does not have"),
    ],
)
async def test_what_cannot_be_read_says_why(change: Callable[[dict[str, Any]], None], why: str) -> None:
    data = await damaged(change)
    with pytest.raises(errors.InvalidRequest, match=why):
        _ = Session.restore(data)


async def test_bounds_of_tools_may_be_numbers_of_any_length() -> None:
    def far(steps: Annotated[int, Ge(-(10**30)), Le(10**30)]) -> int:
        return steps

    async with ScriptedEngine(lambda asked: "Hello.") as engine, engine.session(tools=[far]) as s:
        _ = await s.generate("Hi.")
        async with Session.restore(await s.snapshot(), s.engine, tools=[far]) as again:
            assert (again.messages, again.tools[0].schema) == (s.messages, s.tools[0].schema)


async def test_children_of_a_restored_session_have_other_ids_than_those_that_it_had() -> None:
    async with ScriptedEngine(lambda asked: "Hello.") as engine:
        async with engine.session(name="s") as s, s.fork(2) as (_, last):
            data = await s.snapshot()
        async with Session.restore(data, s.engine) as again, again.fork(1) as (child,):
            assert (last.id, child.id) == ("s.2", "s.3")


async def test_a_copy_is_a_session_of_its_own_and_outlives_the_first() -> None:
    async with ScriptedEngine(lambda asked: "Hello.") as engine:
        async with engine.session(system="You are brief.", tenant="acme", timeout=9.0) as s:
            _ = await s.generate("Hi.")
            _ = await s.generate("More.")
            whole, half = s.copy(), s.copy(at=s.starts[2])
        async with whole, half:
            assert (whole.ids, whole.messages, whole.defaults) == (s.ids, s.messages, s.defaults)
            assert half.messages == s.messages[:2] and half.ids == s.ids[: s.starts[2]]
            assert whole.id != half.id and whole.parent is None
            assert (await half.generate("And?")).text == (await whole.generate("And?")).text == "Hello."
            assert len(half.messages) == 4 and len(whole.messages) == 6
