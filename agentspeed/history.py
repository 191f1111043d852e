"""Finds the session of a list of messages: the longest common log, continued or branched.

Clients of HTTP endpoints and of agent frameworks hold the whole history and send it again at every call. `History`
keeps the sessions of earlier calls and gives each call the one that shares the most with it. Messages are compared by
what they say (canonical messages, hashed in a chain), so a match costs one hash a message; what the model itself wrote
keeps the ids that it drew, and is never tokenised again.

Three outcomes, decided by `choose` and carried out by `History.take`:

- *continue*: an idle session whose whole log is a prefix of the list goes on;
- *rewind*: an idle session of the same conversation (by the caller's hint) went on differently: it goes back;
- *branch*: anything else that shares messages: a new session over the same ids, which computes none of them again while
  the engine has their rows. The other session stays as it is.

A thread that says what another has said goes on in a log of its own where it has one (`own_log`): else each of its
calls would branch off the other's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, final

from agentspeed.errors import SessionBusy, SessionClosed
from agentspeed.messages import Assistant, Message, System, ToolMessage, User
from agentspeed.session import Session
from agentspeed.tools import Tool
from agentspeed.usage import Lease

_LOG = logging.getLogger("agentspeed.history")
_KEY_BYTES = 16
_SEPARATOR = "\x1f"


# ---- what is compared -----------------------------------------------------------------------------------------------
@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A caller's list of messages, and what stands above it.

    `hint`: the caller's own name of the conversation (a thread, a cache key); it never decides what matches, only
    which of several logs that do is its own, and whether that may be rewound when it went on differently. Conversations
    of two tenants never share a session."""

    messages: tuple[Message, ...]
    system: str | None = None
    tools: tuple[Tool, ...] = ()
    tenant: str = ""
    hint: str | None = None


def root_key(conversation: Conversation) -> bytes:
    """What two conversations must have in common before their messages are compared at all."""
    definitions = [tool.definition() for tool in conversation.tools]
    above = [conversation.tenant, "" if conversation.system is None else f"+{conversation.system}"]
    return _digest(b"", [*above, json.dumps(definitions, sort_keys=True)])


def keys(root: bytes, messages: Sequence[Message]) -> list[bytes]:
    """One key for each prefix of `messages`, the empty one first: equal keys, equal conversations up to there.

    Ids of calls do not count, since frameworks make their own: a result names its call by its place among the calls of
    the message before it. Arguments are compared as JSON values."""
    found = [root]
    calls: dict[str, int] = {}
    for message in messages:
        found.append(_digest(found[-1], _canonical(message, calls)))
    return found


def _canonical(message: Message, calls: dict[str, int]) -> list[str]:
    match message:
        case System(text=text):
            return ["system", text]
        case User(text=text):
            return ["user", text]
        case Assistant(text=text, tool_calls=made):
            calls.clear()
            calls.update({call.id: place for place, call in enumerate(made)})
            return ["assistant", text, *(part for call in made for part in (call.name, _value(call.arguments)))]
        case ToolMessage(call_id=call_id, text=text):
            return ["tool", str(calls.get(call_id, call_id)), text]


def _value(arguments: str) -> str:
    """Equal for texts of equal JSON values; a text that is no JSON stands for itself."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _digest(above: bytes, parts: Sequence[str]) -> bytes:
    """Each part goes in behind its length, so that no two lists of parts are the same bytes."""
    found = hashlib.blake2b(above, digest_size=_KEY_BYTES)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.digest()


# ---- what is decided ------------------------------------------------------------------------------------------------
@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """A known log, as far as a decision needs it. `length`: its messages."""

    entry: int
    length: int
    idle: bool
    hint: str | None
    used_at: float


@final
@dataclass(frozen=True, slots=True)
class Reuse:
    """What to do with which log. `shared`: messages that both have."""

    verb: Literal["continue", "rewind", "branch"]
    entry: int
    shared: int


def choose(shared: int, candidates: Iterable[Candidate], hint: str | None) -> Reuse | None:
    """The best of the logs that share `shared` messages with a conversation; None where there is nothing to gain."""
    if shared == 0:
        return None  # the engine shares the rows of equal system texts by itself
    thread = thread_of(hint)
    ranked = sorted(candidates, key=lambda one: (_rank(one, shared, hint), thread_of(one.hint) != thread, -one.used_at))
    if not ranked:
        return None
    best = ranked[0]
    verbs: tuple[Literal["continue", "rewind", "branch"], ...] = ("continue", "rewind", "branch")
    return Reuse(verbs[min(_rank(best, shared, hint), 2)], best.entry, shared)


def own_log(
    messages: Sequence[Message], shared: int, holders: Callable[[int], Iterable[Candidate]], hint: str | None
) -> Reuse | None:
    """The log of a conversation's own thread, where another's shares more with it: both threads said the same, and
    each goes on in its own. It must have all that the model has said in the conversation: what was drawn is never read
    again as text. `holders`: the logs that have so many of the messages."""
    thread = thread_of(hint)
    said = (place + 1 for place in range(shared - 1, -1, -1) if isinstance(messages[place], Assistant))
    for length in range(shared - 1, max(1, next(said, 1)) - 1, -1):
        own = [one for one in holders(length) if one.idle and one.length == length and thread_of(one.hint) == thread]
        if own:
            return Reuse("continue", max(own, key=lambda one: one.used_at).entry, length)
    return None


def hint_of(thread: str, place: str) -> str:
    """What a conversation in a framework's thread is called. `place`: where in the thread."""
    return f"{thread}{_SEPARATOR}{place}"


def thread_of(hint: str | None) -> str | None:
    """The thread of what `hint_of` gave; any other hint is one itself."""
    return None if hint is None else hint.rpartition(_SEPARATOR)[0] or hint


def _rank(one: Candidate, shared: int, hint: str | None) -> int:
    if one.idle and one.length == shared:
        return 0
    if one.idle and hint is not None and one.hint == hint:
        return 1
    return 2


# ---- what is carried out --------------------------------------------------------------------------------------------
@final
@dataclass(slots=True)
class _Entry:
    """One session of the pool, and the keys of its log's prefixes."""

    number: int
    session: Session
    tenant: str
    hint: str | None
    keys: list[bytes]
    idle: bool = False
    used_at: float = 0.0
    known: set[bytes] = field(default_factory=set)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A session that is the caller's until its block ends."""

    session: Session
    messages: tuple[Message, ...]
    """What of the conversation is not in the session yet: the next turn's prompt. The calls that results name are the
    session's own."""
    verb: Literal["continue", "rewind", "branch", "new"]
    shared: int
    """Messages of the conversation that the session had already."""
    shared_tokens: int
    """Tokens of its log that were kept."""
    why: str
    """Why not more was shared; empty when all but the new messages was."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A session of the pool as bytes, for `Session.restore`. `state` is another one after every turn: the key of all
    that was said, as `keys` makes it."""

    name: str
    tenant: str
    state: str
    data: bytes


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of the sessions that wait for their conversation to go on."""

    idle: int = 256
    idle_per_tenant: int = 256
    idle_seconds: float = 600.0


@final
class History:
    """The sessions of one engine that wait for their conversations to go on. Belongs to one event loop.

    `open_session` makes a session that was not entered yet, for a conversation that shares nothing: its caller
    decides about its options. `recall` hears, before a session is chosen, which longer prefixes of the conversation no
    session has (their states, the longest first), and may `put` one that has."""

    def __init__(
        self,
        open_session: Callable[[Conversation], Session],
        *,
        recall: Callable[[Conversation, Sequence[str]], Awaitable[None]] | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_session = open_session
        self._recall = recall
        self._limits = limits or Limits()
        self._clock = clock
        self._entries: dict[int, _Entry] = {}
        self._by_key: dict[bytes, dict[int, None]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Oldest use first."""
        self._count = 0

    @property
    def idle(self) -> int:
        """Sessions that wait."""
        return len(self._idle)

    @property
    def open(self) -> int:
        """Sessions that are known, in use ones included."""
        return len(self._entries)

    @asynccontextmanager
    async def take(self, conversation: Conversation) -> AsyncIterator[Taken]:
        """`async with history.take(conversation) as taken:` then `taken.session.stream(taken.messages, ...)`.

        The session goes back to the pool at the end of the block, whatever its turn came to; one that cannot be used
        again (its block was left, its engine is gone for good) is dropped. Raises what opening a session raises."""
        chain = keys(root_key(conversation), conversation.messages)
        if self._recall is not None and (unknown := self._unknown(chain, conversation.messages)):
            await self._recall(conversation, unknown)
        choice = self._choice(chain, conversation)
        entry, taken = await self._carry_out(choice, conversation, chain)
        try:
            yield taken
        finally:
            await self._give_back(entry)

    def _unknown(self, chain: Sequence[bytes], messages: Sequence[Message]) -> list[str]:
        """States of prefixes that only a model's message could have made, and that no session has."""
        known = max((place for place, key in enumerate(chain) if key in self._by_key), default=0)
        said = any(isinstance(message, Assistant) for message in messages[known:])
        return [key.hex() for key in reversed(chain[known + 1 :])] if said else []

    def _choice(self, chain: Sequence[bytes], conversation: Conversation) -> Reuse | None:
        def holders(shared: int) -> list[Candidate]:
            entries = [self._entries[number] for number in self._by_key.get(chain[shared], ())]
            # One with an idle_timeout may have closed itself, and one that is being entered cannot be copied yet.
            return [self._candidate(entry) for entry in entries if entry.session.state == "open"]

        for shared in range(len(chain) - 1, 0, -1):
            if candidates := holders(shared):
                found = choose(shared, candidates, conversation.hint)
                if found is None or found.verb != "branch":
                    return found
                return own_log(conversation.messages, shared, holders, conversation.hint) or found
        return None

    def _candidate(self, entry: _Entry) -> Candidate:
        return Candidate(entry.number, len(entry.keys) - 1, entry.idle, entry.hint, entry.used_at)

    async def _carry_out(
        self, choice: Reuse | None, conversation: Conversation, chain: list[bytes]
    ) -> tuple[_Entry, Taken]:
        """From the choice to the entry's being in use nothing is awaited: no other call can take the same session."""
        if choice is None:
            entry = self._enter_book(self._open_session(conversation), conversation, chain[:1])
            verb: Literal["continue", "rewind", "branch", "new"] = "new"
            shared, why = 0, "no session of an earlier call shares a message with this one"
        else:
            source = self._entries[choice.entry]
            verb, shared, why = choice.verb, choice.shared, ""
            if verb == "branch":
                why = self._why_branched(source, shared, len(chain) - 1)
                entry = self._enter_book(
                    source.session.copy(at=source.session.position(shared)), conversation, source.keys[: shared + 1]
                )
            else:
                entry = source
                self._occupy(entry)
        try:
            session = entry.session
            if verb in ("new", "branch"):
                await self._make_room(conversation.tenant)
                _ = await session.__aenter__()
            elif verb == "rewind":
                await session.rewind(session.position(shared))
                why = f"the conversation went back to its message {shared} and on from there"
            entry.hint = conversation.hint
            return entry, Taken(
                session=session,
                messages=_translated(conversation.messages, shared, session.messages),
                verb=verb,
                shared=shared,
                shared_tokens=session.tokens,
                why=why,
            )
        except BaseException:
            if verb in ("new", "branch"):
                await self._drop(entry)
            else:
                await self._give_back(entry)
            raise

    def _why_branched(self, source: _Entry, shared: int, sent: int) -> str:
        if not source.idle:
            return "" if shared == len(source.keys) - 1 else f"the session with {shared} of {sent} messages is in use"
        return f"the conversation differs from the longest known one after message {shared}"

    # ---- the book ---------------------------------------------------------------------------------------------------
    def _enter_book(self, session: Session, conversation: Conversation, chain: Sequence[bytes]) -> _Entry:
        self._count += 1
        entry = _Entry(self._count, session, conversation.tenant, conversation.hint, [])
        self._entries[entry.number] = entry
        self._follow(entry, list(chain))
        return entry

    def _occupy(self, entry: _Entry) -> None:
        entry.idle = False
        self._idle.pop(entry.number, None)

    def _follow(self, entry: _Entry, chain: list[bytes]) -> None:
        """The entry's log is `chain` now."""
        old, entry.keys = entry.keys, chain
        same = next(
            (at for at, (one, other) in enumerate(zip(old, chain, strict=False)) if one != other),
            min(len(old), len(chain)),
        )
        for key in old[same:]:
            holders = self._by_key.get(key, {})
            holders.pop(entry.number, None)
            if not holders:
                self._by_key.pop(key, None)
        for key in chain[same:]:
            self._by_key.setdefault(key, {})[entry.number] = None

    async def _give_back(self, entry: _Entry) -> None:
        if entry.session.state == "closed":
            await self._drop(entry)
            return
        self._follow(entry, keys(entry.keys[0], entry.session.messages))
        entry.idle, entry.used_at = True, self._clock()
        self._idle[entry.number] = None

    async def _drop(self, entry: _Entry) -> None:
        self._occupy(entry)
        self._entries.pop(entry.number, None)
        self._follow(entry, [])
        await entry.session.close()

    # ---- what outlives the process ----------------------------------------------------------------------------------
    async def kept(self, wanted: Callable[[str | None], bool], known: Mapping[str, str]) -> AsyncIterator[Kept]:
        """The idle sessions of the hints that are `wanted`, oldest use first. `known`: states by name, of those that
        are not needed again. One that goes on meanwhile is left out: its turn's end is another moment to ask."""
        for number in list(self._idle):
            entry = self._entries.get(number)
            if entry is None or not entry.idle or not wanted(entry.hint):
                continue
            session, state = entry.session, entry.keys[-1].hex()
            if known.get(session.id) == state:
                continue
            try:
                kept = Kept(name=session.id, tenant=entry.tenant, state=state, data=await session.snapshot())
            except (SessionBusy, SessionClosed):  # one with an idle_timeout may have closed itself
                continue
            yield kept

    async def put(self, session: Session, conversation: Conversation) -> None:
        """A restored session, not entered yet, that waits for its conversation to go on. Raises what entering raises;
        it is not among the pool's then."""
        entry = self._enter_book(session, conversation, keys(root_key(conversation), session.messages))
        try:
            await self._make_room(conversation.tenant)
            _ = await session.__aenter__()
        except BaseException:
            await self._drop(entry)
            raise
        await self._give_back(entry)

    async def expect(self, wanted: Callable[[str | None], bool], seconds: float | None, tool: str) -> list[Lease]:
        """Idle sessions of the hints that are `wanted` wait under a lease from now on; see `Session.expect`. Gives the
        engine's answers, one a session."""
        found: list[Lease] = []
        for number in list(self._idle):
            entry = self._entries.get(number)
            if entry is None or not entry.idle or not wanted(entry.hint) or entry.session.state != "open":
                continue
            self._occupy(entry)  # a call that wants it meanwhile branches off
            try:
                found.append(await entry.session.expect(seconds, tool=tool))
            finally:
                await self._give_back(entry)
        return found

    async def forget(self, wanted: Callable[[str | None], bool]) -> None:
        """Closes the idle sessions of the hints that are `wanted`."""
        for number in list(self._idle):
            entry = self._entries.get(number)
            if entry is not None and entry.idle and wanted(entry.hint):
                await self._drop(entry)

    # ---- bounds -----------------------------------------------------------------------------------------------------
    async def _make_room(self, tenant: str) -> None:
        """Before one more session opens: those that waited longest go, those of the same tenant first at its bound."""
        own = [number for number in self._idle if self._entries[number].tenant == tenant]
        going = own[: max(0, len(own) - self._limits.idle_per_tenant + 1)]
        rest = [number for number in self._idle if number not in going]
        going += rest[: max(0, len(rest) - self._limits.idle + 1)]
        for number in going:
            if (entry := self._entries.get(number)) is not None and entry.idle:
                await self._drop(entry)

    async def sweep(self) -> None:
        """Closes what has been idle for `idle_seconds`; to be called now and then."""
        late = self._clock() - self._limits.idle_seconds
        for number in list(self._idle):
            entry = self._entries.get(number)
            if entry is None or not entry.idle:  # another call took or closed it while one before it was closed here
                continue
            if entry.used_at > late:
                return
            await self._drop(entry)

    async def close(self) -> None:
        """Closes every session, in use ones included."""
        for entry in list(self._entries.values()):
            await self._drop(entry)


def _translated(messages: Sequence[Message], shared: int, own: Sequence[Message]) -> tuple[Message, ...]:
    """What comes after the first `shared` messages; results name the calls of the session's own log by its own ids."""
    ids: dict[str, str] = {}
    found: list[Message] = []
    for place, message in enumerate(messages):
        if isinstance(message, Assistant):
            mine = own[place] if place < shared else message
            kept = mine.tool_calls if isinstance(mine, Assistant) else message.tool_calls
            ids = {given.id: call.id for given, call in zip(message.tool_calls, kept, strict=True)}
        if place < shared:
            continue
        if isinstance(message, ToolMessage) and message.call_id in ids:
            message = ToolMessage(call_id=ids[message.call_id], name=message.name, text=message.text, ok=message.ok)
        found.append(message)
    return tuple(found)
