"""One request's turn on the session of its conversation: what every endpoint that is given a history does."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, final

import anyio
import msgspec

from agentspeed import __version__
from agentspeed._base.wording import counted
from agentspeed.chat import transcript
from agentspeed.chat.key_values import ArgumentKinds
from agentspeed.chat.token_log import TokenLog
from agentspeed.engine import Engine
from agentspeed.history import Conversation, History, Limits, Taken
from agentspeed.server.metrics import Metrics
from agentspeed.server.options import ServerOptions
from agentspeed.server.problems import Problem, RequestProblem, refused
from agentspeed.server.saved_sessions import SavedSessions
from agentspeed.server.snapshot_files import SnapshotFiles
from agentspeed.server.streaming import AtOnce, Told
from agentspeed.session import Session, TurnOptions
from agentspeed.turn import Reply, Turn


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an endpoint was asked for, in the SDK's terms."""

    conversation: Conversation
    options: TurnOptions
    output: Any = str
    choices: int = 1
    metadata: Mapping[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a request came to. `prompt` counts the tokens that the model had read when it first spoke."""

    replies: tuple[Reply[Any], ...]
    prompt: int
    cached: int
    drawn: int
    taken: Taken


@final
class Service:
    """One engine, the sessions of its conversations, and how many requests it has in work."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.engine = engine
        self.options = options
        self.started_at = int(time.time())
        self.model_name = os.path.basename(os.fspath(engine.model).rstrip("/"))
        self.fingerprint = f"agentspeed-{__version__}"
        files = snapshot_files(options)
        self.saved = None if files is None else SavedSessions(files, engine)
        self.history = History(
            self._open,
            recall=None if self.saved is None else self._recall,
            limits=Limits(
                idle=options.idle_sessions, idle_per_tenant=options.idle_sessions, idle_seconds=options.idle_seconds
            ),
        )
        self.metrics = Metrics()
        self.running = 0
        self._drained_at: float | None = None

    def drain(self) -> None:
        """Nothing new is taken from now on, and what runs has `drain_seconds`."""
        if self._drained_at is None:
            self._drained_at = time.monotonic() + self.options.drain_seconds

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._drained_at is not None

    @property
    def drain_left(self) -> float:
        """Seconds that what runs may still take."""
        return 0.0 if self._drained_at is None else max(0.0, self._drained_at - time.monotonic())

    async def wait_for_drain(self, most: float) -> None:
        """Returns when the server was told to end, or after `most` seconds."""
        for _ in range(int(most / 0.1)):  # a signal handler tells, and it can set no event
            if self.draining:
                return
            await anyio.sleep(0.1)

    def _open(self, conversation: Conversation) -> Session:
        return self.engine.session(
            system=conversation.system, tools=conversation.tools, tenant=conversation.tenant or None, reasoning=True
        )

    async def _recall(self, conversation: Conversation, states: Sequence[str]) -> None:
        if self.saved is not None:
            await self.saved.recall(self.history, conversation, states)

    def count(self, conversation: Conversation) -> int:
        """Tokens that the model would read before it speaks."""
        kinds = ArgumentKinds({tool.name: tool.schema for tool in conversation.tools})
        codec = self.engine.codec.with_tools(kinds)
        log = TokenLog()
        log.append(codec.opening(conversation.system, [tool.definition() for tool in conversation.tools]))
        _ = transcript.open_reply(log, codec, list(conversation.messages))
        return len(log)

    def takes_more(self) -> None:
        """Raises `RequestProblem` when the server is about to end."""
        if self.draining:
            raise RequestProblem(
                Problem(
                    status=503,
                    kind="server_error",
                    code="draining",
                    retry_after=5,
                    message="The server is about to end. Ask again: another will answer.",
                )
            )

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """One request in work. Raises `RequestProblem` when there are too many, or the server is about to end."""
        self.takes_more()
        if self.running >= self.options.max_requests:
            raise RequestProblem(
                Problem(
                    status=429,
                    kind="rate_limit_error",
                    code="too_many_requests",
                    retry_after=1,
                    message=f"{counted(self.running, 'request')} in work, all that this server takes. Come back later.",
                )
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def turn(self, request: Request, told: Told | None = None, at_once: AtOnce | None = None) -> Answer:
        """Runs the request to its end; `told` hears every event that `at_once` did not take. Whatever cancels this ends
        the turn."""
        begun = time.monotonic()
        async with self.admitted(), self.history.take(request.conversation) as taken:
            self.metrics.matched.labels(taken.verb).inc()
            answer = await self._answered(request, taken, told, at_once)
        for reply in answer.replies:
            self.metrics.turn(reply.usage, reply.finish_reason, time.monotonic() - begun)
        return answer

    async def _answered(self, request: Request, taken: Taken, told: Told | None, at_once: AtOnce | None) -> Answer:
        options: TurnOptions = {
            **request.options,
            "timeout": request.options.get("timeout") or self.options.turn_seconds,
        }
        if request.choices == 1:
            turn = taken.session.stream(taken.messages or None, output=request.output, **options)
            reply = await _read(0, turn, told, at_once)
            return _answer((reply,), taken)
        return _answer(await self._several(request, options, taken, told, at_once), taken)

    async def _several(
        self, request: Request, options: TurnOptions, taken: Taken, told: Told | None, at_once: AtOnce | None
    ) -> tuple[Reply[Any], ...]:
        """Choices are forks: the prompt is computed once. The conversation goes on with the first."""
        replies: dict[int, Reply[Any]] = {}
        seed = options.get("seed")  # the same seed would give every choice the same draws
        self.metrics.forks.inc(request.choices)
        async with taken.session.fork(request.choices) as branches:
            async with anyio.create_task_group() as group:

                async def one(index: int, branch: Session) -> None:
                    own: TurnOptions = {**options}
                    if seed is not None:
                        own["seed"] = seed + index
                    turn = branch.stream(taken.messages or None, output=request.output, **own)
                    replies[index] = await _read(index, turn, told, at_once)

                for index, branch in enumerate(branches):
                    group.start_soon(one, index, branch)
            await taken.session.adopt(branches[0])
        return tuple(replies[index] for index in range(request.choices))


async def _read(index: int, turn: Turn[Any], told: Told | None, at_once: AtOnce | None) -> Reply[Any]:
    async with turn:
        await turn.follow(
            None if told is None else lambda batch: told(index, batch),
            None if at_once is None else lambda batch: at_once(index, batch),
        )
        return turn.result()


def _answer(replies: tuple[Reply[Any], ...], taken: Taken) -> Answer:
    first = replies[0].usage
    prompt = first.new + first.resumed_device + first.resumed_host + first.recomputed
    return Answer(
        replies=replies,
        prompt=prompt,
        cached=first.prefill_saved,
        drawn=sum(reply.usage.drawn for reply in replies),
        taken=taken,
    )


def snapshot_files(options: ServerOptions) -> SnapshotFiles | None:
    """The folder of the options. Raises `InvalidRequest`."""
    if options.snapshots is None:
        return None
    return SnapshotFiles(options.snapshots, most_bytes=options.snapshot_bytes, most_seconds=options.snapshot_seconds)


def parsed(body: bytes, kind: type[msgspec.Struct]) -> Any:
    """The request's body as `kind`. Raises `RequestProblem` that names what is wrong, and where."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        where = text.rpartition("`$.")[2].rstrip("`") if "`$." in text else None
        raise refused(text, param=where) from error
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise refused(f"The body is no JSON: {error}") from error
