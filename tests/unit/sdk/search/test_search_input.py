"""Wrong input to a search: our own error that names the argument, before anything is forked."""

from __future__ import annotations

from typing import Any

import pytest

from agentspeed import Session
from agentspeed.errors import AgentspeedError, InvalidRequest, InvalidSampling
from agentspeed.search import Found, Node, beam, best_of_n, mcts, tree_of_thought
from agentspeed.testing import ScriptedEngine, Turn, tool_call
from agentspeed_engine.protocol import messages as wire

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def one(_: Node) -> float:
    return 1.0


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def search(method: str, session: Any, prompt: Any = "Go.", **options: Any) -> Found:
    """Any of the four, with the least that it needs."""
    given = {"score": one, **options}
    match method:
        case "best_of_n":
            return await best_of_n(session, prompt, **{"n": 2, **given})
        case "beam":
            return await beam(session, prompt, **{"width": 1, "branching": 2, "depth": 1, **given})
        case "tree_of_thought":
            return await tree_of_thought(session, prompt, **{"branching": 2, "depth": 1, **given})
        case _:
            return await mcts(session, prompt, **{"iterations": 1, **given})


METHODS = ("best_of_n", "beam", "tree_of_thought", "mcts")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"seed": "x"}, InvalidRequest, "seed is 'x'"),
        ({"seed": None}, InvalidRequest, "seed is None"),
        ({"score": 3}, InvalidRequest, "score is 3"),
        ({"score": None}, InvalidRequest, "score is None"),
        ({"keep": 3}, InvalidRequest, "keep is 3"),
        ({"solved_at": "high"}, InvalidRequest, "solved_at is 'high'"),
        ({"budget": {}}, InvalidRequest, "budget is {}"),
        ({"budget": {"tokens": 5}}, InvalidRequest, "budget is {'tokens': 5}"),
        ({"prompt": 3}, InvalidRequest, "3 is no message"),
        ({"prompt": ["Hi", 3]}, InvalidRequest, "3 is no message"),
        ({"adopt": "no"}, InvalidRequest, "adopt is 'no'"),
        ({"temperature": "hot"}, InvalidSampling, "temperature is 'hot'"),
        ({"stop": 5}, InvalidRequest, "stop is 5"),
        ({"stop": ""}, InvalidRequest, "stop is ''"),
        ({"max_tokens": "many"}, InvalidRequest, "max_tokens is 'many'"),
        ({"max_tokns": 5}, InvalidRequest, "Unknown options max_tokns"),
        ({"tools": [add]}, InvalidRequest, "does not describe the tools add"),
    ],
)
async def test_a_wrong_argument_is_named_before_anything_is_forked(
    method: str, options: Any, error: type[AgentspeedError], told: str
) -> None:
    async with ScriptedEngine([]) as engine, engine.session() as session:
        with pytest.raises(error, match=told):
            _ = await search(method, session, **options)
        assert not [command for command in engine._server.commands if isinstance(command, wire.Fork)]


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("mcts", {"exploration": "x"}, "exploration is 'x'"),
        ("mcts", {"stop": None}, "stop is None"),
        ("beam", {"stop": None}, "stop is None"),
        ("beam", {"least": "low"}, "least is 'low'"),
        ("best_of_n", {"at_once": "all"}, "at_once is 'all'"),
        ("best_of_n", {"attempt": 3}, "attempt is 3"),
    ],
)
async def test_a_wrong_argument_of_one_method_is_named(method: str, options: Any, told: str) -> None:
    async with ScriptedEngine([]) as engine, engine.session() as session:
        with pytest.raises(InvalidRequest, match=told):
            _ = await search(method, session, **options)
        assert not [command for command in engine._server.commands if isinstance(command, wire.Fork)]


@pytest.mark.parametrize("method", METHODS)
async def test_only_a_session_can_be_searched_from(method: str) -> None:
    with pytest.raises(InvalidRequest, match="session is 3"):
        _ = await search(method, 3)


@pytest.mark.parametrize("options", [{"max_tokens": 5}, {"keep": lambda text: True}])
async def test_what_an_own_attempt_would_ignore_is_refused(options: Any) -> None:
    async def attempt(branch: Session) -> str:
        return (await branch.generate(None)).text

    async with ScriptedEngine([]) as engine, engine.session() as session:
        with pytest.raises(InvalidRequest, match=f"attempt= .*{next(iter(options))}"):
            _ = await best_of_n(session, "Go.", n=1, score=one, attempt=attempt, **options)


async def test_any_whole_number_is_a_seed() -> None:
    async with ScriptedEngine(lambda _: "Fine.") as engine, engine.session() as session:
        for seed in (0, -5, 2**62):
            assert (await best_of_n(session, "Go.", n=2, score=one, seed=seed)).text == "Fine."


# ---- tools ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
async def test_a_session_with_tools_is_searched_by_attempts_or_without_calls(method: str) -> None:
    async with ScriptedEngine([]) as engine, engine.session(tools=[add]) as session:
        with pytest.raises(InvalidRequest, match=r"tools add.*attempt=.*tools=\[\]"):
            _ = await search(method, session)
        assert session.messages == ()


@pytest.mark.parametrize("options", [{"tools": []}, {"tool_choice": "none"}])
@pytest.mark.parametrize("method", METHODS)
async def test_without_calls_no_branch_can_call_a_tool(method: str, options: Any) -> None:
    async with ScriptedEngine(lambda _: "Fine.") as engine, engine.session(tools=[add]) as session:
        found = await search(method, session, **options)
        assert found.text == "Fine."
    async with ScriptedEngine(lambda _: tool_call("add", a=1, b=2)) as engine, engine.session(tools=[add]) as session:
        found = await search(method, session, **options)
        assert found.best is None
        assert {node.state for node in found.root.children} == {"failed"}
        assert session.messages == ()


async def test_an_own_attempt_runs_the_tools_of_its_branch() -> None:
    async def attempt(branch: Session) -> str:
        return (await branch.run(None)).text

    def model(turn: Turn) -> str:
        return "It is 3." if "<|tool|>" in turn.log else tool_call("add", a=1, b=2)

    async with ScriptedEngine(model) as engine, engine.session(tools=[add]) as session:
        found = await best_of_n(session, "Add.", n=2, score=one, attempt=attempt)
        assert found.text == "It is 3."
        assert [message.text for message in session.messages] == ["Add.", "", "3", "It is 3."]
