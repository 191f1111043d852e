"""Tries that fail, alone or all of them; a session that is busy; a prompt that no budget has room for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from agentspeed import Session, ToolContext, tool
from agentspeed.errors import (
    ConnectFailed,
    EngineDied,
    EngineOverloaded,
    InternalError,
    InvalidRequest,
    OutputError,
    SessionBusy,
    ToolFailed,
    TurnTimeout,
)
from agentspeed.search import Budget, Node, beam, best_of_n
from agentspeed.testing import ScriptedEngine, Turn, say, tool_call
from agentspeed_engine.protocol import messages as wire

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def scripted(script: object, **options: object) -> AsyncIterator[tuple[ScriptedEngine, Session]]:
    async with ScriptedEngine(script) as engine, engine.session(**options) as session:  # type: ignore[arg-type]
        yield engine, session


def one(_: Node) -> float:
    return 1.0


def first_is_slow(turn: Turn) -> object:
    return say("slow " * 30, seconds=1.0) if turn.turn == 1 else "fast"


def raising(*which: Exception | None) -> Callable[[Session], object]:
    """An attempt whose tries raise these, in the order in which they are begun; where None, and later, it answers."""
    left = list(which)

    async def attempt(branch: Session) -> str:
        error = left.pop(0) if left else None
        reply = await branch.generate(None)
        if error is not None:
            raise error
        return reply.text

    return attempt


def forks(engine: ScriptedEngine) -> int:
    return sum(isinstance(command, wire.Fork) for command in engine._server.commands)


# ---- one try fails --------------------------------------------------------------------------------------------------
async def test_a_branch_that_is_too_slow_fails_alone() -> None:
    async with scripted(first_is_slow) as (engine, session):
        found = await best_of_n(session, "Go.", n=4, score=one, timeout=2.0)
        failed, *others = sorted(found.root.children, key=lambda node: node.state != "failed")
        assert (failed.state, [node.state for node in others]) == ("failed", ["finished"] * 3)
        assert isinstance(failed.error, TurnTimeout)
        assert failed.text.startswith("slow") and failed.usage.drawn > 0
        assert (found.text, found.ended, session.messages[-1].text) == ("fast", "exhausted", "fast")
        assert engine.live_branches == 1


async def test_a_slow_step_of_a_beam_fails_alone() -> None:
    async with scripted(lambda turn: say("slow one here", seconds=1.0) if turn.turn == 1 else "step 2\nmore") as (
        engine,
        session,
    ):
        found = await beam(session, "Go.", width=2, branching=2, depth=1, score=one, timeout=2.0)
        assert sorted(node.state for node in found.root.children) == ["failed", "open"]
        assert engine.live_branches == 1


async def test_a_tool_that_raises_in_one_attempt_fails_that_attempt() -> None:
    @tool(on_error="raise")
    def count(n: int) -> int:
        """Count."""
        if n == 1:
            raise ValueError("once")
        return n

    async def attempt(branch: Session) -> str:
        return (await branch.run(None)).text

    def model(turn: Turn) -> str:
        return tool_call("count", n=turn.turn) if turn.session_turn == 1 else "done"

    async with scripted(model, tools=[count]) as (engine, session):
        found = await best_of_n(session, "Go.", n=4, score=one, attempt=attempt)
        (failed,) = [node for node in found.root.children if node.state == "failed"]
        assert isinstance(failed.error, ToolFailed) and "once" in str(failed.error)
        assert (found.text, engine.live_branches) == ("done", 1)


async def test_an_own_attempt_that_raises_fails_alone_and_keeps_its_error_and_what_it_said() -> None:
    error = RuntimeError("mine\nalone")
    async with scripted(lambda _: "said") as (engine, session):
        found = await best_of_n(session, "Go.", n=4, score=one, attempt=raising(error))  # type: ignore[arg-type]
        (failed,) = [node for node in found.root.children if node.error is not None]
        assert (failed.error, failed.state, failed.text, failed.score) == (error, "failed", "said", None)
        assert failed.usage.computed > 0
        assert (found.text, engine.live_branches) == ("said", 1)
        shown = str(found)
        assert "RuntimeError: mine alone" in shown and "4 branches (0 pruned, 1 failed)" in shown
        assert "RuntimeError: mine alone" in "".join(str(child.label) for child in found.tree().children)


async def test_a_judge_that_fails_on_one_answer_fails_that_answer() -> None:
    def judge(node: Node) -> float:
        if node.number == 1:
            raise OutputError("no number")
        return 1.0

    async with scripted(lambda _: "said") as (_, session):
        found = await best_of_n(session, "Go.", n=2, score=judge)
        assert [node.state for node in found.root.children] == ["failed", "finished"]
        assert found.root.children[0].text == "said"


# ---- the search cannot go on ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        InternalError("a rule was broken"),
        EngineDied("gone"),
        EngineOverloaded("full"),
        ConnectFailed("nobody there"),
        ExceptionGroup("of a task group", [ValueError("other"), EngineDied("gone")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_engine_that_cannot_go_on_ends_the_whole_search(error: Exception) -> None:
    async with scripted(lambda _: "said") as (engine, session):
        with pytest.raises(type(error)) as raised:
            _ = await best_of_n(session, "Go.", n=3, score=one, attempt=raising(error))  # type: ignore[arg-type]
        assert str(raised.value) == str(error)
        assert (engine.live_branches, session.messages) == (1, ())


async def test_when_every_try_failed_the_first_error_is_raised_with_the_tree() -> None:
    tries = raising(OutputError("no answer"), RuntimeError("first"), ValueError("second"))
    async with scripted(lambda _: "said") as (engine, session):
        with pytest.raises(RuntimeError, match="first") as raised:
            _ = await best_of_n(session, "Go.", n=3, score=one, attempt=tries, at_once=1)  # type: ignore[arg-type]
        (note,) = raised.value.__notes__
        assert "Every try of the search failed" in note and "RuntimeError: first" in note and "ValueError: sec" in note
        assert (engine.live_branches, session.messages) == (1, ())


async def test_texts_that_are_no_output_are_nothing_found_and_not_an_error() -> None:
    async with scripted(lambda _: '{"n": 1') as (engine, session):
        found = await best_of_n(session, "Go.", n=2, score=one, output=dict[str, int], max_tokens=3)
        assert (found.best, found.ended, found.cost.failed, engine.live_branches) == (None, "exhausted", 2, 1)
        assert "OutputError" in str(found)


async def test_a_search_whose_every_turn_is_too_slow_raises_the_timeout() -> None:
    async with scripted(lambda _: say("slow one here", seconds=1.0)) as (engine, session):
        with pytest.raises(TurnTimeout):
            _ = await best_of_n(session, "Go.", n=2, score=one, timeout=0.3)
        assert (engine.live_branches, session.messages) == (1, ())


# ---- a busy session -------------------------------------------------------------------------------------------------
async def test_a_search_on_a_session_with_a_running_turn_is_refused_before_anything_is_forked() -> None:
    async with scripted(lambda _: say("abc def", seconds=0.5)) as (engine, session), session.stream("Talk."):
        with pytest.raises(SessionBusy, match="adopt=False, or search on a fork"):
            _ = await best_of_n(session, "Go.", n=2, score=one)
        assert forks(engine) == 0


async def test_a_tool_searches_its_own_session_without_adopting_or_on_a_fork() -> None:
    told: list[str] = []

    @tool
    async def think(context: ToolContext[None]) -> str:
        """Think."""
        with pytest.raises(SessionBusy, match=r"a tool has not ended.*adopt=False, or search on a fork"):
            _ = await best_of_n(context.session, "Go.", n=2, score=one, tools=[])
        told.append((await best_of_n(context.session, "Go.", n=2, score=one, tools=[], adopt=False)).text)
        async with context.session.fork() as (branch,):
            told.append((await best_of_n(branch, "Go.", n=2, score=one, tools=[])).text)
            told.append(branch.messages[-1].text)
        return "thought"

    async with scripted(lambda turn: tool_call("think") if turn.turn == 1 else "fine", tools=[think]) as (
        engine,
        session,
    ):
        result = await session.run("Plan.")
        assert (told, result.text, engine.live_branches) == (["fine"] * 3, "fine", 1)


async def test_a_search_beside_a_running_turn_leaves_it_alone_when_it_does_not_adopt() -> None:
    async with (
        scripted(lambda turn: say("talking on", seconds=0.3) if turn.turn == 1 else "fine") as (_, session),
        session.stream("Talk.") as turn,
    ):
        found = await best_of_n(session, "Go.", n=2, score=one, adopt=False)
        assert (found.text, (await turn.reply()).text) == ("fine", "talking on")


# ---- a prompt and a token budget ------------------------------------------------------------------------------------
@pytest.mark.parametrize("added", [False, True], ids=["as the prompt", "added before"])
async def test_a_budget_that_the_prompt_alone_takes_is_refused_before_anything_is_computed(added: bool) -> None:
    async with scripted([]) as (engine, session):
        if added:
            _ = await session.add("word " * 200)
        with pytest.raises(InvalidRequest, match=r"Budget\(tokens=100\) .* 4\d\d tokens"):
            _ = await best_of_n(session, None if added else "word " * 200, n=2, score=one, budget=Budget(tokens=100))
        assert not [command for command in engine._server.commands if isinstance(command, wire.Generate)]
        assert engine.live_branches == 1


async def test_what_the_session_has_computed_already_takes_nothing_of_a_budget() -> None:
    async with scripted(lambda _: "fine") as (_, session):
        _ = await session.add("word " * 200, prefill=True)
        found = await best_of_n(session, "Go.", n=1, score=one, budget=Budget(tokens=100))
        assert (found.text, found.cost.tokens <= 100) == ("fine", True)


async def test_a_search_never_computes_less_without_fork_than_with_it() -> None:
    async with scripted(lambda _: say("slow " * 9, seconds=0.5)) as (_, session):
        found = await best_of_n(session, "word " * 200, n=1, score=one, budget=Budget(seconds=0.3))
        assert found.ended == "seconds"
        assert found.cost.tokens_without_fork >= found.cost.tokens > 200
        assert "(1.0 times)" in str(found)


async def test_a_search_whose_time_is_over_before_it_forked_finds_nothing() -> None:
    async with scripted(lambda _: "fine") as (_, session):
        found = await best_of_n(session, "Go.", n=2, score=one, budget=Budget(seconds=1e-9))
        assert (found.best, found.ended, found.cost.branches) == (None, "seconds", 0)
        assert (await session.generate("Go.")).text == "fine"
