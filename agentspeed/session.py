"""The session: what an agent opens, goes on with, forks and rewinds. It owns no task and no KV."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, final

import anyio
from agentspeed_engine import wire
from agentspeed_engine.ids import pack_ids, unpack_ids

from agentspeed import errors, events
from agentspeed.engine import Engine
from agentspeed.front.mirror import Checkpoint, Mirror, Span
from agentspeed.front.output import output_spec
from agentspeed.front.parser import TurnParser
from agentspeed.messages import Assistant, Message, ToolCall, User
from agentspeed.sampling import Sampling
from agentspeed.tools import Tool, tools_from
from agentspeed.turn import Reply, Turn, TurnPlan, lease_of, residence_of
from agentspeed.usage import Lease, Residence, Usage

if TYPE_CHECKING:
    from agentspeed.backends.link import Link
    from agentspeed.forks import Forks
    from agentspeed.trajectory import Trajectory

T = TypeVar("T")
_CLOSE_SECONDS = 5.0


@final
class Mark:
    """A token position of one session that can be returned to."""

    __slots__ = ("name", "point")

    def __init__(self, name: str | None, point: Checkpoint) -> None:
        self.name = name
        self.point = point

    @property
    def tokens(self) -> int:
        return self.point.tokens

    def __repr__(self) -> str:
        return f"<Mark {self.name or ''}@{self.tokens}>"


@final
class Session:
    """`async with Session("model", system="...", tools=[...]) as s: reply = await s.generate("...")`

    `model`: a Hugging Face model folder or repository id, an `Engine`, or None for the model that ships with the
    package. Sessions of one model and the same `engine_options` share one engine process. A session belongs to one
    task at a time; one turn at a time. `private` rows are never shared and are dropped at the end; `tenant` separates
    what may be shared. `record_logprobs` keeps the drawn ids' log-probabilities for `trajectory()`."""

    def __init__(
        self,
        model: str | os.PathLike[str] | Engine | None = None,
        *,
        system: str | None = None,
        tools: Sequence[Tool | Callable[..., object]] = (),
        sampling: Sampling | None = None,
        private: bool = False,
        tenant: str = "",
        seed: int | None = None,
        name: str | None = None,
        timeout: float | None = None,
        record_logprobs: bool = False,
        reasoning: bool = False,
        close_timeout: float = _CLOSE_SECONDS,
        **engine_options: Any,
    ) -> None:
        self.id = name or secrets.token_hex(4)
        self.system = system
        self.tools = tools_from(tools)
        self.sampling = sampling or Sampling()
        self.parent: Session | None = None
        if isinstance(model, Engine):
            if engine_options:
                raise errors.InvalidRequest(f"Unknown options {sorted(engine_options)}.",
                                            remedy="Engine options are given to Engine(...).")
            self.engine, self._owns_engine = model, False
        else:
            self.engine, self._owns_engine = Engine.shared(model, engine_options), True
        self._private, self._tenant = private, tenant
        self._seed = secrets.randbits(62) if seed is None else seed
        self._timeout, self._close_timeout = timeout, close_timeout
        self._record_logprobs, self._reasoning = record_logprobs, reasoning
        self._mirror = Mirror()
        self._link: Link | None = None
        self._branch: int | None = None
        self._turn: Turn[Any] | None = None
        self._before_turn: Checkpoint | None = None
        self._state = "new"
        self._children = itertools.count(1)
        self._label = "root"
        self._events = itertools.count(1)
        self._call_ids = itertools.count(1)
        self._trunk_moves = 0
        self._forked_at: int | None = None
        self._moves = 0
        self._residence = Residence(device=0, host=0, lost=0)
        self._lease: Lease | None = None
        self.usage = Usage()

    # ---- the block ------------------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise errors.SessionClosed("A session is entered once.", remedy="Make a new one, or restore a snapshot.")
        if self._owns_engine:
            await self.engine.start()
        self._state = "open"
        try:
            if not len(self._mirror):
                definitions = [tool.definition() for tool in self.tools]
                self._mirror.append(self.engine.codec.opening(self.system, definitions))
            await self._ensure_branch()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self._leave()

    async def close(self) -> None:
        """Ends the session before its block does: what only it holds is free at once. Calling it again does nothing."""
        await self._leave()

    async def _leave(self) -> None:
        """Bounded, shielded, and silent about an engine that is gone: nothing may hide the body's own exception."""
        if self._state == "closed":
            return
        self._state = "closed"
        with anyio.CancelScope(shield=True):
            await self._close_branch()
            if self._owns_engine:
                await self.engine.close()

    async def _close_branch(self) -> None:
        link, branch, self._branch = self._link, self._branch, None
        if link is None or branch is None or not link.alive:
            return
        link.unlisten(branch)
        with anyio.move_on_after(self._close_timeout):
            try:
                await link.call(lambda number: wire.Close(request=number, branch=branch))
            except errors.AgentspeedError:
                return  # the engine, and with it everything it held for us, is gone already

    # ---- turns ----------------------------------------------------------------------------------------------------
    def stream(
        self,
        prompt: str | Message | Sequence[Message] | None = None,
        *,
        output: Any = str,
        tools: Sequence[Tool | Callable[..., object]] | None = None,
        tool_choice: str = "auto",
        parallel_calls: int = 16,
        sampling: Sampling | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] = (),
        max_tokens: int | None = None,
        logprobs: int | None = None,
        seed: int | None = None,
        keep_on_cancel: bool = False,
        timeout: float | None = None,
    ) -> Turn[Any]:
        """A turn to iterate over: `async with s.stream("...") as turn: async for event in turn: ...`

        Without a prompt the turn goes on with the open assistant message, if there is one. Raises `SessionBusy` when
        a turn runs, `InvalidRequest`/`SchemaUnsupported`/`ContextOverflow` for what cannot be; nothing changes then."""
        offered = self.tools if tools is None else tools_from(tools)
        base = sampling or self.sampling
        heat = base.temperature if temperature is None else temperature
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if any(not text for text in stops):
            raise errors.InvalidRequest("A stop string is empty.", remedy="Leave it out.")

        def plan() -> TurnPlan:
            return self._plan(
                prompt, output=output, tools=offered, tool_choice=tool_choice, parallel_calls=parallel_calls,
                stops=stops, max_tokens=max_tokens, seed=seed, keep_on_cancel=keep_on_cancel,
                timeout=self._timeout if timeout is None else timeout,
                sampling=wire.Sampling(temperature=heat, top_k=base.top_k, top_p=base.top_p, min_p=base.min_p,
                                       logprobs=0 if logprobs is None and self._record_logprobs else logprobs),
            )

        return Turn(self, plan)

    async def generate(self, prompt: str | Message | Sequence[Message] | None = None, *, output: Any = str,
                       **options: Any) -> Reply[Any]:
        """One whole turn; the options are those of `stream`. Raises `OutputError` when the text is not an `output`."""
        async with self.stream(prompt, output=output, **options) as turn:
            return await turn.reply()

    async def add(self, *messages: str | Message, prefill: bool = False) -> Mark:
        """Messages without a turn; a string is a user's. `prefill` computes their rows now, while nobody waits."""
        self._must_be_idle()
        link, branch = await self._ensure_branch()
        point = self._mirror.checkpoint()
        self._append_messages(_messages(messages))
        ids = pack_ids(self._mirror.ids[point.tokens :])
        try:
            if prefill:
                await self._prefill(link, branch, ids)
            else:
                await link.call(lambda number: wire.Append(request=number, branch=branch, ids=ids))
        except BaseException:
            self._mirror.back_to(point)
            await self._resync(point.tokens)
            raise
        self._moves += 1
        return Mark(None, self._mirror.checkpoint())

    async def _prefill(self, link: Link, branch: int, ids: bytes) -> None:
        done = anyio.Event()

        def sink(event: wire.Event | None) -> None:
            if event is None or isinstance(event, wire.TurnEnded):
                done.set()

        link.listen(branch, sink)
        await link.call(lambda number: wire.Generate(request=number, branch=branch, ids=ids, max_tokens=0))
        await done.wait()

    # ---- branches -------------------------------------------------------------------------------------------------
    def fork(self, n: int = 1, *, at: Mark | str | int | None = None) -> Forks:
        """`async with s.fork(4) as branches:` n children with the same context; no prefill, no copy.

        Legal while a turn runs: the children share what is committed so far, and their assistant message is open.
        They are closed at the end of the block, unless adopted."""
        from agentspeed.forks import Forks

        self._must_be_open()
        return Forks(self, n, None if at is None else self._point(at).tokens)

    async def adopt(self, child: Session) -> None:
        """The child's context becomes this session's; the child is closed.

        Raises `SessionBusy` when either has a turn running, `TrunkMoved` when this session went on since the fork,
        `ChildUnrelated` for anything but a child of this session."""
        self._must_be_idle()
        child._must_be_idle()
        if child.parent is not self:
            raise errors.ChildUnrelated(f"{child.id} is not a child of {self.id}.",
                                        remedy="Adopt a child of this session.")
        if child._forked_at != self._moves:
            raise errors.TrunkMoved("This session went on after the fork.",
                                    remedy="Adopt before it goes on, or go on with the child.")
        link, branch = await self._ensure_branch()
        child_link, child_branch = await child._ensure_branch()
        try:
            await link.call(lambda number: wire.Adopt(request=number, branch=branch, child=child_branch))
        except (errors.ChildUnrelated, errors.TrunkMoved):
            # The engine was started anew since the fork and no longer knows the kinship: the branches change places.
            self._branch, child._branch = child_branch, branch
            await child._close_branch()
        child_link.unlisten(child_branch)
        child._branch = None
        child._state = "closed"
        self._mirror = child._mirror
        self.usage = self.usage + child.usage
        self._moves += 1

    async def mark(self, name: str | None = None) -> Mark:
        """Here, to come back to with `rewind`; a name is remembered and travels to forks."""
        self._must_be_idle()
        mark = Mark(name, self._mirror.checkpoint())
        if name is not None:
            self._mirror.marks[name] = mark.point
        return mark

    async def rewind(self, to: Mark | str | int) -> None:
        """Exactly back to a mark, or to any token position. Rows after it stay cached. Raises `MarkNotFound`."""
        self._must_be_idle()
        point = self._point(to)
        link, branch = await self._ensure_branch()
        await link.call(lambda number: wire.Rewind(request=number, branch=branch, tokens=point.tokens))
        self._mirror.back_to(point)
        self._moves += 1

    def _point(self, to: Mark | str | int) -> Checkpoint:
        if isinstance(to, str):
            if to not in self._mirror.marks:
                known = ", ".join(self._mirror.marks) or "none"
                raise errors.MarkNotFound(f"There is no mark {to!r}; the marks are: {known}.")
            return self._mirror.marks[to]
        tokens = to if isinstance(to, int) else to.tokens
        if not 0 <= tokens <= len(self._mirror):
            raise errors.MarkNotFound(f"Position {tokens} is not in a session of {len(self._mirror)} tokens.",
                                      remedy="It was rewound to before that point.")
        return self._mirror.at(tokens) if isinstance(to, int) else to.point

    # ---- pauses ---------------------------------------------------------------------------------------------------
    async def expect(self, seconds: float, *, keep: wire.Keep = "soft", tool: str = "") -> Lease:
        """Says when this session will be used again; the answer says what was granted, until when, and why."""
        self._must_be_idle()
        link, branch = await self._ensure_branch()
        reply = await link.call(
            lambda number: wire.Expect(request=number, branch=branch, seconds=seconds, keep=keep, tool=tool))
        if not isinstance(reply, wire.LeaseAnswer):
            raise errors.InternalError(f"The engine answered Expect with {type(reply).__name__}.")
        self._lease = lease_of(reply.lease)
        self._residence = self._lease.residence
        return self._lease

    async def inspect(self) -> wire.Inspected:
        """What the engine says of this branch now; `residence` and `repr` show it afterwards."""
        self._must_be_open()
        link, branch = await self._ensure_branch()
        reply = await link.call(lambda number: wire.Inspect(request=number, branch=branch))
        if not isinstance(reply, wire.Inspected):
            raise errors.InternalError(f"The engine answered Inspect with {type(reply).__name__}.")
        self._residence = residence_of(reply.residence)
        return reply

    # ---- durable values -------------------------------------------------------------------------------------------
    async def snapshot(self) -> bytes:
        """Ids, messages, marks and options: everything but KV. `Session.restore` opens it again, anywhere."""
        from agentspeed.snapshots import dump

        self._must_be_idle()
        return dump(self)

    @classmethod
    def restore(cls, data: bytes, model: str | os.PathLike[str] | Engine | None = None, **options: Any) -> Session:
        """A session as it was at `snapshot`; enter it like any other. Tools are functions: give them again.

        Raises `InvalidRequest` for what is no snapshot, or one of another version or tokenizer."""
        from agentspeed.snapshots import load

        return load(data, model, options)

    def trajectory(self) -> Trajectory:
        """Ids, log-probabilities and the mask of model-made ids, exactly as the engine computed on them."""
        from agentspeed.trajectory import Trajectory

        return Trajectory.of(self._mirror)

    # ---- what it is -----------------------------------------------------------------------------------------------
    @property
    def messages(self) -> tuple[Message, ...]:
        """Whole messages, in order."""
        return self._mirror.messages

    @property
    def tokens(self) -> int:
        """Known tokens."""
        return len(self._mirror)

    @property
    def ids(self) -> tuple[int, ...]:
        """Every id of the log."""
        return tuple(self._mirror.ids)

    @property
    def residence(self) -> Residence:
        """Where the rows were when the engine last said so (turns, `expect`, `inspect`)."""
        return self._residence

    @property
    def lease(self) -> Lease | None:
        """The engine's last answer to `expect`; None once a turn has begun."""
        return self._lease

    def __repr__(self) -> str:
        turns = f"{self.usage.turns} turn{'' if self.usage.turns == 1 else 's'}"
        state = {"new": "new", "closed": "closed"}.get(self._state, "held" if self._turn is None else "running")
        where = f"{self._residence.device} device"
        lost = self._residence.lost - 1  # the last id of a turn is drawn, and computed when it is fed
        if self._residence.host:
            where += f", {self._residence.host} host"
        if lost > 0:
            where += f", {lost} lost"
        kept = f" · {self._lease.keep} lease {self._lease.seconds:g}s" if self._lease is not None else ""
        return f"<Session {self.id} {self._label} · {turns} · {self.tokens} tok · {state}{kept} · {where}>"

    # ---- for Turn, Forks and the agent loop -----------------------------------------------------------------------
    def _must_be_open(self) -> None:
        if self._state != "open":
            raise errors.SessionClosed(
                "The session is closed." if self._state == "closed" else "The session was not entered.",
                remedy="Use it inside `async with`.")

    def _must_be_idle(self) -> None:
        self._must_be_open()
        if self._turn is not None:
            raise errors.SessionBusy("A turn of this session is running.",
                                     remedy="Wait for it, leave its block, or fork to go two ways at once.")

    async def _ensure_branch(self) -> tuple[Link, int]:
        """The living link and this session's branch on it; after an engine's death, a new branch with the same ids."""
        link = await self.engine.link()
        if self._branch is not None and self._link is link:
            return link, self._branch
        ids = pack_ids(self._mirror.ids)
        reply = await link.call(lambda number: wire.Open(
            request=number, ids=ids, tenant=self._tenant, private=self._private, seed=self._seed))
        if not isinstance(reply, wire.Opened):
            raise errors.InternalError(f"The engine answered Open with {type(reply).__name__}.")
        self._link, self._branch = link, reply.branch
        self._residence = residence_of(reply.residence)
        return link, reply.branch

    def _append_messages(self, messages: Sequence[Message]) -> None:
        """Closes an open assistant message and appends whole ones to the mirror."""
        mirror, codec = self._mirror, self.engine.codec
        if mirror.open_at is not None:
            mirror.append(codec.closing(None))
        else:
            mirror.append(mirror.owed)
        mirror.open_at, mirror.owed = None, ()
        for message in messages:
            start = len(mirror)
            mirror.append(codec.message(message))
            mirror.spans.append(Span(message, start, len(mirror)))

    def _plan(self, prompt: str | Message | Sequence[Message] | None, *, output: Any, tools: Sequence[Tool],
              tool_choice: str, parallel_calls: int, stops: tuple[str, ...], max_tokens: int | None, seed: int | None,
              keep_on_cancel: bool, timeout: float | None, sampling: wire.Sampling) -> TurnPlan:
        """Appends what the turn needs to the mirror. The caller cuts it back when anything goes wrong."""
        mirror = self._mirror
        spec = output_spec(output)
        grammar = None
        if tools or spec is not None:
            from agentspeed.front.grammar import turn_grammar

            grammar = turn_grammar(tools=tools, tool_choice=tool_choice, parallel_calls=parallel_calls, output=spec,
                                   reasoning=self._reasoning, tags=self.engine.codec.tags)
        start = len(mirror)
        continues: list[int] = []
        messages = _messages(() if prompt is None else prompt if isinstance(prompt, list | tuple) else (prompt,))
        if messages or mirror.open_at is None:
            self._append_messages(messages)
            mirror.append(self.engine.codec.generation_ids)
            mirror.open_at = len(mirror)
        else:
            continues = list(mirror.ids[mirror.open_at :])
            if mirror.spans and mirror.spans[-1].end > mirror.open_at:
                _ = mirror.spans.pop()  # its message was a partial one; the whole one takes its place
        return TurnPlan(ids=list(mirror.ids[start:]), continues=continues, sampling=sampling, max_tokens=max_tokens,
                        stop=stops, grammar=grammar, output=spec, parser=TurnParser(reasoning=self._reasoning),
                        seed=seed, keep_on_cancel=keep_on_cancel, timeout=timeout)

    async def _begin(self, turn: Turn[Any], make: Callable[[], TurnPlan]) -> TurnPlan:
        self._must_be_idle()
        self._turn = turn
        point = self._before_turn = self._mirror.checkpoint()
        try:
            try:
                plan = await self._send(turn, make)
            except errors.EngineDied:  # it went while nothing of ours was running: begin once more on a new one
                self._mirror.back_to(point)
                plan = await self._send(turn, make)
        except BaseException:
            self._turn = None
            self._mirror.back_to(point)
            await self._resync(point.tokens)
            raise
        self._lease = None
        self._moves += 1
        return plan

    async def _send(self, turn: Turn[Any], make: Callable[[], TurnPlan]) -> TurnPlan:
        """Opens the branch if need be, then appends and queues the turn."""
        link, branch = await self._ensure_branch()
        plan = make()
        link.listen(branch, lambda event: self._heard(turn, event))
        grammar = None if plan.grammar is None else wire.Grammar(source=plan.grammar, consumed=len(plan.continues))
        await link.call(lambda number: wire.Generate(
            request=number, branch=branch, ids=pack_ids(plan.ids), max_tokens=plan.max_tokens,
            sampling=plan.sampling, stop_ids=self.engine.codec.stop_ids,
            stop_strings=tuple(text.encode() for text in plan.stop), grammar=grammar, seed=plan.seed))
        return plan

    def _heard(self, turn: Turn[Any], event: wire.Event | None) -> None:
        """Events go to the mirror at once, so that a fork of a running turn knows every committed id."""
        if isinstance(event, wire.Tokens):
            self._mirror.drew(unpack_ids(event.ids), event.logprobs)
        turn.sink(event)

    def _turn_ended(self, turn: Turn[Any], event: wire.TurnEnded, message: Assistant) -> None:
        mirror = self._mirror
        start = mirror.spans[-1].end if mirror.spans else 0
        if event.reason == "stop_id":
            mirror.open_at, mirror.owed = None, tuple(self.engine.codec.closing(mirror.ids[-1]))
        elif event.reason == "grammar_end":
            mirror.open_at, mirror.owed = None, tuple(self.engine.codec.closing(None))
        mirror.spans.append(Span(message, start, len(mirror)))
        self._residence = Residence(device=max(0, event.known - 1), host=0, lost=min(1, event.known))
        self.usage = self.usage + turn.usage
        self._turn = None

    async def _abort(self, turn: Turn[Any], *, failed: bool) -> None:
        """Stops a turn that was left early; the log goes back to before its messages, or keeps its partial text."""
        plan, point = turn._plan, self._before_turn
        assert plan is not None and point is not None
        keep = plan.keep_on_cancel and self._link is not None and self._link.alive
        with anyio.CancelScope(shield=True):
            await self._cancel_branch(None if keep else point.tokens)
        if keep:
            codec, mirror = self.engine.codec, self._mirror
            start = mirror.spans[-1].end if mirror.spans else 0
            drawn_end = mirror.ids[-1] if mirror.ids[-1] in codec.stop_ids else None
            mirror.open_at, mirror.owed = None, tuple(codec.closing(drawn_end))
            mirror.spans.append(Span(Assistant(turn.text), start, len(mirror)))
        else:
            self._mirror.back_to(point)
        turn._finished = True
        self._turn = None

    async def _cancel_branch(self, cut: int | None) -> None:
        """Bounded: an engine that does not answer loses the link, and the session opens anew at its next use."""
        link, branch = self._link, self._branch
        if link is None or branch is None or not link.alive:
            return
        with anyio.move_on_after(self._close_timeout) as scope:
            try:
                await link.call(lambda number: wire.Cancel(request=number, branch=branch, cut=cut))
            except errors.AgentspeedError:
                self._branch = None
        if scope.cancelled_caught:
            link.close()
        if self._branch is not None:
            link.unlisten(branch)

    async def _resync(self, tokens: int) -> None:
        """After a call that failed or was cancelled at an unknown point: the branch is cut back to the mirror."""
        with anyio.CancelScope(shield=True):
            await self._cancel_branch(None)
            link, branch = self._link, self._branch
            if link is None or branch is None or not link.alive:
                return
            with anyio.move_on_after(self._close_timeout):
                try:
                    await link.call(lambda number: wire.Rewind(request=number, branch=branch, tokens=tokens))
                except errors.AgentspeedError:
                    self._branch = None

    def _engine_died(self, turn: Turn[Any]) -> errors.AgentspeedError:
        """The engine went during a turn: what was committed before it stays, the next use opens it anew."""
        assert self._before_turn is not None
        self._mirror.back_to(self._before_turn)
        self._branch = None
        self._turn = None
        assert self._link is not None
        return self._link._death()

    def _stamped(self, event: events.AnyEvent) -> events.AnyEvent:
        import msgspec

        stamped: events.AnyEvent = msgspec.structs.replace(event, seq=next(self._events), session_id=self.id)
        return stamped

    def _next_call_id(self) -> str:
        return f"call_{self.id}_{next(self._call_ids)}"


def _messages(given: Sequence[str | Message]) -> list[Message]:
    return [User(item) if isinstance(item, str) else item for item in given]


__all__ = ["Mark", "Session", "ToolCall"]
