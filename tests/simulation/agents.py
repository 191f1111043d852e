"""Scripted agents. What an agent says depends on its label and the seed alone, never on what happens to it.

So whatever goes wrong, an agent that comes to its end has said and heard what it would have in peace.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, final

from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from tests.simulation.front import Alone, Ask, Died, Ends, Handle, Join, Script, Sleep, Start, Tool
from tests.simulation.workload import VOCABULARY, AgentSpec, Span, Workload

MOST_TRIES = 40
"""Refusals of one command that say "try again"; then the agent gives up, by that name."""
Ending: TypeAlias = Literal["finished", "refused", "gone", "stuck"]
_COMMON = tuple((7 * number + 3) % VOCABULARY for number in range(512))


class Refused(Exception):
    """The engine refused by name what the agent cannot do without."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@final
@dataclass(slots=True, eq=False)
class Agent:
    """One script on its way, and what came of its turns."""

    label: str
    link: LinkId
    spec: AgentSpec
    draw: random.Random
    script: Script[None] | None = None
    state: Literal["running"] | Ending = "running"
    """`stuck`: its tool never returned, so it waits for ever without a turn."""
    waits: int = 0
    """Raised with every effect, so that an answer that comes too late is told apart."""
    on: object = None
    """The effect it waits on."""
    transcript: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Label of a turn to all ids of its branch afterwards."""
    refused: list[str] = field(default_factory=list[str])

    def __repr__(self) -> str:
        return f"<{self.label} {self.state}>"

    # ---- chance, in the order of the script -----------------------------------------------------------------------
    def number(self, span: Span) -> int:
        return self.draw.randint(round(span.low), round(span.high))

    def seconds(self, span: Span) -> float:
        return self.draw.uniform(span.low, span.high)

    def ids(self, span: Span) -> list[int]:
        return [self.draw.randrange(VOCABULARY) for _ in range(self.number(span))]

    # ---- talking to the engine ------------------------------------------------------------------------------------
    def ask(self, handle: Handle, command: Callable[[int], wire.Command]) -> Script[wire.Outgoing]:
        """One command, again after an engine's death or a refusal that says so. Raises `Refused`."""
        tries = 0
        while True:
            yield from self.opened(handle)
            assert handle.number is not None
            reply = yield Ask(handle, command(handle.number))
            if isinstance(reply, Died):
                continue
            if isinstance(reply, wire.Failed):
                tries += 1
                yield from self.wait_to_retry(reply, tries)
                continue
            return _message(reply)

    def opened(self, handle: Handle) -> Script[None]:
        """Opens a handle that no engine knows, with the ids its front mirrored."""
        tries = 0
        while handle.number is None:
            reply = yield Ask(
                handle,
                wire.Open(request=0, ids=pack_ids(handle.mirror.ids), tenant=handle.tenant, private=handle.private),
            )
            if isinstance(reply, wire.Failed):
                tries += 1
                yield from self.wait_to_retry(reply, tries)

    def wait_to_retry(self, failed: wire.Failed, tries: int) -> Script[None]:
        self.refused.append(failed.code)
        if not failed.retryable or tries >= MOST_TRIES:
            raise Refused(failed.code)
        yield Sleep(0.5)

    def turn(
        self,
        handle: Handle,
        ids: Sequence[int],
        most: int,
        label: str,
        meanwhile: Callable[[], Script[None]] | None = None,
    ) -> Script[None]:
        """One turn, as often as it takes: what was cut short is asked again from where it began."""
        before = handle.known
        while True:
            reply = yield from self.ask(
                handle,
                lambda number: wire.Generate(
                    request=0,
                    branch=number,
                    ids=pack_ids(list(ids)),
                    max_tokens=most,
                    stop_ids=tuple(range(self.spec.stops)),
                ),
            )
            assert isinstance(reply, wire.Done), reply
            if meanwhile is not None:
                action, meanwhile = meanwhile, None
                yield from action()
            ended = yield Ends(handle)
            if isinstance(ended, wire.TurnEnded) and ended.reason in ("max_tokens", "stop_id"):
                self.transcript[f"{self.label}/{label}"] = tuple(handle.mirror.ids)
                return
            yield Sleep(0.01)
            if handle.number is None:
                handle.mirror.cut(before)
            elif handle.known > before:
                yield from self.rewind(handle, before)

    def rewind(self, handle: Handle, known: int) -> Script[None]:
        _ = yield from self.ask(handle, lambda number: wire.Rewind(request=0, branch=number, tokens=known))

    def fork(self, handle: Handle, n: int) -> Script[list[Handle]]:
        """Children with what the branch knew when the fork took place."""
        reply = yield from self.ask(handle, lambda number: wire.Fork(request=0, branch=number, n=n))
        assert isinstance(reply, wire.Forked), reply
        return list(handle.born)

    def close(self, handle: Handle) -> Script[None]:
        if handle.number is not None:
            _ = yield Ask(handle, wire.Close(request=0, branch=handle.number))

    def adopt(self, trunk: Handle, child: Handle) -> Script[Handle]:
        """What goes on with the child's ids: the trunk, or the child itself when either had to be opened anew."""
        if trunk.number is not None and child.number is not None:
            reply = yield Ask(trunk, wire.Adopt(request=0, branch=trunk.number, child=child.number))
            if isinstance(reply, wire.Done):
                return trunk
        yield from self.close(trunk)
        return child

    def tool(self, handle: Handle) -> Script[None]:
        """A tool call: the engine is told how long it may take, and answers with a lease."""
        seconds = self.seconds(self.spec.pause)
        yield from self.expect(handle, seconds)
        yield Tool(seconds)

    def expect(self, handle: Handle, seconds: float) -> Script[None]:
        keep = self.spec.keep
        if keep == "none":
            return
        answered = yield from self.ask(
            handle,
            lambda number: wire.Expect(
                request=0,
                branch=number,
                seconds=seconds,
                keep="firm" if keep == "firm" else "soft",
                tool=self.spec.name,
            ),
        )
        assert isinstance(answered, wire.LeaseAnswer), answered

    def begin(self) -> Handle:
        """A new session's handle, with its first ids already in the mirror's hands."""
        return Handle(self.link, private=self.spec.private, tenant=self.spec.tenant)

    def prompt(self) -> list[int]:
        return [*_COMMON[: self.spec.shared], *self.ids(self.spec.prompt)]


# ---- the kinds ----------------------------------------------------------------------------------------------------
def tool_user(agent: Agent, workload: Workload) -> Script[None]:
    """Asks, waits for a tool, sends its result, and so on."""
    handle = agent.begin()
    ids = agent.prompt()
    for turn in range(agent.number(agent.spec.turns)):
        yield from agent.turn(handle, ids, agent.number(agent.spec.drawn), f"turn-{turn}")
        yield from agent.tool(handle)
        ids = agent.ids(agent.spec.sent)
    yield from agent.close(handle)


def brancher(agent: Agent, workload: Workload) -> Script[None]:
    """Forks at rest or while a turn runs, goes on with the best child, and backs up now and then."""
    spec = agent.spec
    trunk = agent.begin()
    ids = agent.prompt()
    for turn in range(agent.number(spec.turns)):
        mark = trunk.known
        most, count = agent.number(spec.drawn) + (4 if spec.live else 0), agent.number(spec.children)
        children: list[Handle] = []

        def branch(trunk: Handle = trunk, count: int = count, children: list[Handle] = children) -> Script[None]:
            yield Sleep(0.1)
            children += yield from agent.fork(trunk, count)

        yield from agent.turn(trunk, ids, most, f"turn-{turn}", branch if spec.live else None)
        if not spec.live:
            yield from branch()
            yield from agent.expect(trunk, agent.seconds(spec.pause))
        said, end = trunk.mirror.ids[mark : mark + len(ids)], trunk.known
        started: list[Agent] = []
        for index, child in enumerate(children):
            label = f"{agent.label}/turn-{turn}/child-{index}"
            helper = _agent(label, agent.link, spec, workload.name, agent.draw.random())
            missing = said[max(0, child.known - mark) :] if spec.live else helper.ids(spec.sent)
            goal = end - child.known - len(missing) if spec.live else helper.number(spec.drawn)
            helper.script = _child(helper, child, missing, goal)
            yield Start(helper)
            started.append(helper)
        yield Join(tuple(started))
        if (given_up := next((one for one in started if one.state == "refused"), None)) is not None:
            raise Refused(given_up.refused[-1])  # whom it takes for the best would not be whom it takes in peace
        unwanted = children
        if not spec.live:
            best = min(children, key=lambda child: child.mirror.rows[-1])
            unwanted = [child for child in children if child is not best]
            trunk = yield from agent.adopt(trunk, best)
        for child in unwanted:
            yield from agent.close(child)
        yield from agent.tool(trunk)
        if turn % 2:
            yield from agent.rewind(trunk, (mark + trunk.known) // 2)
        ids = agent.ids(spec.sent)
    yield from agent.close(trunk)


def _child(agent: Agent, handle: Handle, ids: Sequence[int], most: int) -> Script[None]:
    if most > 0:
        yield from agent.turn(handle, ids, most, "turn")
    else:
        agent.transcript[f"{agent.label}/turn"] = tuple(handle.mirror.ids)


def parent(agent: Agent, workload: Workload) -> Script[None]:
    """Sends sub-agents and waits for all of them, its own context under a lease; they need the same pool."""
    spec = agent.spec
    handle = agent.begin()
    ids = agent.prompt()
    for turn in range(agent.number(spec.turns)):
        yield from agent.turn(handle, ids, agent.number(spec.drawn), f"turn-{turn}")
        count = agent.number(spec.children)
        begun = (yield from agent.fork(handle, count)) if spec.live else [agent.begin() for _ in range(count)]
        yield from agent.expect(handle, agent.seconds(spec.pause) * 4)
        started: list[Agent] = []
        for index, child in enumerate(begun):
            helper = _agent(
                f"{agent.label}/turn-{turn}/sub-{index}", agent.link, spec, workload.name, agent.draw.random()
            )
            helper.script = _sub_agent(helper, child)
            yield Start(helper)
            started.append(helper)
        yield Join(tuple(started))
        ids = agent.ids(spec.sent)
    yield from agent.turn(handle, ids, agent.number(spec.drawn), "answer")
    yield from agent.close(handle)


def _sub_agent(agent: Agent, handle: Handle) -> Script[None]:
    ids = agent.ids(agent.spec.sent) if agent.spec.live else agent.prompt()
    for turn in range(agent.number(agent.spec.turns)):
        yield from agent.turn(handle, ids, agent.number(agent.spec.drawn), f"turn-{turn}")
        yield from agent.tool(handle)
        ids = agent.ids(agent.spec.sent)
    yield from agent.close(handle)


def arrivals(agent: Agent, workload: Workload) -> Script[None]:
    """New sessions of one turn, as long as anybody else has something to do."""
    for number in range(agent.spec.most):
        if (yield Alone()):
            return
        guest = _agent(f"{agent.label}/{number}", agent.link, agent.spec, workload.name, agent.draw.random())
        guest.script = _guest(guest)
        yield Start(guest)
        yield Sleep(agent.spec.every)


def _guest(agent: Agent) -> Script[None]:
    handle = agent.begin()
    yield from agent.turn(handle, agent.prompt(), agent.number(agent.spec.drawn), "turn")
    yield from agent.close(handle)


_KINDS: dict[str, Callable[[Agent, Workload], Script[None]]] = {
    "tool_user": tool_user,
    "brancher": brancher,
    "parent": parent,
    "arrivals": arrivals,
}


def cast(workload: Workload, seed: int) -> list[tuple[float, Agent]]:
    """Every agent of a workload and when it begins; each has a link of its own."""
    found: list[tuple[float, Agent]] = []
    for group, spec in enumerate(workload.agents):
        for number in range(spec.count):
            label = f"{spec.name or spec.kind}-{group}.{number}"
            agent = _agent(label, LinkId(len(found) + 1), spec, workload.name, seed)
            agent.script = _KINDS[spec.kind](agent, workload)
            found.append((agent.seconds(spec.start), agent))
    return found


def hog(workload: Workload, number: int, link: LinkId) -> Agent:
    """A turn of the whole context limit: while it runs, hardly a page is left for anybody else."""
    limit = workload.engine.context_limit
    spec = AgentSpec(kind="tool_user", prompt=Span(limit - 4, limit - 4), drawn=Span(4, 4))
    agent = _agent(f"hog-{number}", link, spec, workload.name, number)
    agent.script = _guest(agent)
    return agent


def _agent(label: str, link: LinkId, spec: AgentSpec, workload: str, seed: float) -> Agent:
    return Agent(label, link, spec, random.Random(f"{workload}/{label}/{seed}"))


def _message(answer: object) -> wire.Outgoing:
    assert isinstance(answer, wire.Message), answer
    return answer  # type: ignore[return-value]
