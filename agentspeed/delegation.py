"""Agents that use agents, as tools: a sub-agent has a session of its own, a hand-off goes on in the same one."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from agentspeed._core.engine_handle import EngineHandle
from agentspeed.errors import InvalidRequest, ToolFailed
from agentspeed.limits import Limits
from agentspeed.session import Session
from agentspeed.tools import Approve, Tool, ToolContext, tool


def sub_agent(
    name: str,
    description: str,
    *,
    system: str | None = None,
    tools: Sequence[Tool | Callable[..., object]] = (),
    model: str | EngineHandle | None = None,
    output: Any = str,
    max_turns: int = 16,
    max_tokens: int | None = None,
    temperature: float | None = None,
    limits: Limits | None = None,
    approve: Approve | None = None,
    timeout: float | None = None,
) -> Tool:
    """A tool that gives a task to an agent with its own system text and tools, and returns its answer: none of its work
    enters the caller's context. Each call is a session of its own, on the caller's engine and of its tenant, private if
    the caller's is; `model`: on another one. The caller's observer and `tool_data` are the agent's too. The other
    arguments are those of `Session.run`; `timeout` (seconds) is of the whole task. What it spends counts in the limits
    of the caller's run too, and it has no more than those leave.

    What the agent's run raises is the tool's error, and so is an end without an answer: a text that was cut, or a
    limit. Its session ends with the call, so `approve` decides at once: `Approval(later=True)` is such an end."""
    made = tuple(tools)

    @tool(name=name, description=description, timeout=timeout)
    async def delegate(task: str, context: ToolContext[Any]) -> Any:
        """Gives a task to another agent."""
        outer = context.session
        if not isinstance(outer, Session):
            raise InvalidRequest(f"{name} was called outside of a session.", remedy="Let session.run call it.")
        inner = Session(
            outer.engine if model is None else model,
            name=f"{name}-{secrets.token_hex(4)}",
            system=system,
            tools=made,
            tenant=outer.tenant,
            private=outer.private,
            observer=outer.defaults.observer or outer.engine.observer,
        )
        async with inner:
            result = await inner.run(
                task,
                output=output,
                max_turns=max_turns,
                max_tokens=max_tokens,
                temperature=temperature,
                limits=limits,
                approve=approve,
                tool_data=context.data,
            )
        if result.reason == "approval":
            raise ToolFailed(
                "the agent ended without an answer: a call of its own was to be decided about later, and its session "
                "ends with this call; decide about it at once, or give that tool to the caller",
                tool=name,
            )
        whole = result.reason in ("answered", "forced") or result.limit == "tool_calls"  # after which it had to answer
        if not whole or not result.text:
            raise ToolFailed(f"the agent ended without an answer: {result.bound or result.reason}", tool=name)
        return result.output

    return delegate


def hand_off(
    name: str,
    instructions: str,
    *,
    tools: Sequence[Tool | Callable[..., object] | str] = (),
    description: str = "",
) -> Tool:
    """A tool, `transfer_to_<name>`, by which the model hands the rest of a run to another role: the same session goes
    on, with everything that was said, so nothing is computed again. The call's result is `instructions`, and from then
    on the run may call `tools` alone. These must be the session's, which its first message describes; they may be given
    by name, other hand-offs among them:

        writer = hand_off("writer", "You write the text now.", tools=[rhymes])
        async with Session(tools=[search, rhymes, writer]) as s:
            await s.run("...", tools=[search, writer])

    The next run of the session begins with the tools that it is given. `description`: when to hand over; by default the
    name says it."""
    names = tuple(
        one if isinstance(one, str) else one.name if isinstance(one, Tool) else tool(one).name for one in tools
    )

    @tool(name=f"transfer_to_{name}", description=description or f"Hand over to {name}.")
    def transfer() -> str:
        return instructions

    return replace(transfer, hands_over=names)
