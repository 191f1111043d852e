"""Calls of the SDK that must stay type errors, and some that must stay legal. Never run: each coded ignore becomes an
error itself the day its call is legal."""

from __future__ import annotations

from typing import assert_type

from agentspeed import Engine, Session, ToolContext, tool
from agentspeed.replies import Reply
from agentspeed.testing import ScriptedEngine


def options_that_do_not_exist() -> None:
    _ = Engine(page=4)  # type: ignore[call-arg]
    _ = Session(page=4)  # type: ignore[call-arg]
    _ = Engine(pages="4")  # type: ignore[arg-type]
    _ = Engine().session(sytem="")  # type: ignore[call-arg]
    _ = ScriptedEngine([]).session(seed="1")  # type: ignore[arg-type]
    _ = Session.restore(b"", page=4)  # type: ignore[call-arg]


async def an_option_of_a_turn(s: Session) -> None:
    _ = await s.generate("x", temprature=1.0)  # type: ignore[call-overload]
    assert_type(await s.generate("x"), Reply[str])


@tool
async def a_tool_forks_its_session(question: str, context: ToolContext[None]) -> str:
    """Ask a copy of yourself."""
    async with context.session.fork() as (branch,):
        return (await branch.run(question)).text
