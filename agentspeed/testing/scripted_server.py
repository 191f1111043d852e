"""An engine's side of a link without a model: it speaks the wire's frames and writes what a script says.

Below it nothing is real, above it everything is: frames, tokenizer, parser, and the grammar, which every scripted text
must fit or the turn ends in an error that quotes the text.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

import anyio.to_thread
from llguidance import LLMatcher
from tokenizers import Tokenizer

from agentspeed.errors import ModelBroken
from agentspeed.transport.base import Connection
from agentspeed.transport.socket_link import SocketLink
from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.stops import StopWatch
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import command_reader, encode_outbox
from agentspeed_engine.protocol.sampling import validate_sampling
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.serve.model_files import ServedFiles

_LOG: Final = logging.getLogger("agentspeed.testing")
_NO_LIMIT: Final = 1 << 20
"""Tokens of a context of which the model's folder says nothing."""
_PAGE_TOKENS: Final = 64
_CERTAIN: Final = 0.0
_OUT_OF_THE_QUESTION: Final = -40.0
"""Log-probabilities of the id that the script says and of all others: beside it they add up to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedText:
    """What one turn writes; `seconds` pass before each of its tokens."""

    text: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a script may look at: the whole log as text, which turn of the engine this is, and of the session."""

    log: str
    turn: int
    session_turn: int


Script = Callable[[Asked], ScriptedText | None]
"""None: the script has nothing to say to this turn, which is an error of the test."""


@dataclass(slots=True)
class _Branch:
    session: int
    """Tells the branches of one session from others."""
    parent: int | None
    forked_at: int
    log: list[int]
    computed: int = 0
    turns: int = 0
    running: _Turn | None = None


@dataclass(slots=True)
class _Turn:
    """A running turn: ids still to be drawn, and how it ends."""

    command: wire.Generate
    started_at: int
    left: list[int]
    reason: wire.FinishReason
    message: str
    seconds: float
    usage: wire.TurnUsage
    drawn: int = 0


@dataclass(order=True, slots=True)
class _Due:
    at: float
    order: int
    branch: int = field(compare=False)
    turn: _Turn = field(compare=False)


class ScriptRaised(Exception):
    """The test's own function failed: its turn tells, for nobody sees what a thread raises."""


@final
class ScriptedServer:
    """A transport with one thread per link. The script is asked in the order in which turns arrive."""

    pid = None

    def __init__(
        self, folder: Path, script: Script, *, context_limit: int | None = None, max_branches: int = 256
    ) -> None:
        """`context_limit`: None takes what the model's folder says."""
        self.context_limit = _limit_of(folder) if context_limit is None else context_limit
        self.max_branches = max_branches
        self._folder = folder
        self._script = script
        self.files = ServedFiles(folder)
        self._tokenizer = _tokenizer(folder)
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._vocabulary = Vocabulary(folder, size, ())
        self._asking = threading.Lock()
        self._turns = 0
        self._links: list[_ServedLink] = []
        self.commands: list[wire.Command] = []
        """Every command of every link, in order of arrival."""

    async def connect(self, *, after_death: bool) -> Connection:
        """See `transport.base.Transport`."""
        del after_death
        return await SocketLink.connect(self.open(), "agentspeed")

    async def close(self) -> None:
        """Ends every link. The threads end with their links."""
        await anyio.to_thread.run_sync(self._stop)

    def open(self) -> socket.socket:
        """A new link; the engine's side of it runs in a thread."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._links.append(_ServedLink(self, ours))
        return theirs

    def _stop(self) -> None:
        for link in self._links:
            link.stop()

    @property
    def live_branches(self) -> int:
        """Branches that were opened or forked and not closed: 0 when nothing leaked."""
        return sum(len(link.branches) for link in self._links)

    def welcome(self, request: int) -> wire.Welcome:
        """What this engine says of itself."""
        return wire.Welcome(
            request=request,
            protocol=wire.PROTOCOL,
            engine="scripted",
            model=str(self._folder),
            vocab_size=self._vocabulary.vocab_size,
            context_limit=self.context_limit,
            page_tokens=_PAGE_TOKENS,
            pages=0,
            host_slots=0,
            pid=os.getpid(),
            limits={"max_branches": self.max_branches},
        )

    def most_likely(self, drawn: int, count: int) -> tuple[wire.TopLogprob, ...]:
        """As the engine gives them: best first, and of those that tie the lowest ids."""
        others = itertools.islice((number for number in itertools.count() if number != drawn), count - 1)
        return (
            wire.TopLogprob(id=drawn, logprob=_CERTAIN),
            *(wire.TopLogprob(id=number, logprob=_OUT_OF_THE_QUESTION) for number in others),
        )

    def write(self, branch: _Branch, command: wire.Generate) -> _Turn:
        """What the script writes for this turn, cut where the turn's own bounds cut it."""
        usage = wire.TurnUsage(new=len(branch.log) - branch.computed, resumed_device=branch.computed)
        turn = _Turn(
            command=command,
            started_at=len(branch.log),
            left=[],
            reason="max_tokens",
            message="",
            seconds=0.0,
            usage=usage,
        )
        if command.max_tokens == 0:
            return turn
        with self._asking:
            self._turns += 1
            branch.turns += 1
            log = self._tokenizer.decode(branch.log, skip_special_tokens=False)
            try:
                said = self._script(Asked(log=log, turn=self._turns, session_turn=branch.turns))
            except ScriptRaised as error:
                _LOG.debug("a script raised", exc_info=error.__cause__)
                turn.reason, turn.message = "error", str(error)
                return turn
        if said is None:
            turn.reason, turn.message = "error", f"the script has no text for turn {self._turns}"
            return turn
        turn.seconds = said.seconds
        turn.left = list(self._tokenizer.encode(said.text, add_special_tokens=False).ids)
        whole = self._fit(turn, branch, said.text)
        self._stop_early(turn, branch)
        if turn.reason == "max_tokens" and whole:
            if not command.stop_ids:
                turn.reason, turn.message = "error", "the turn has no stop id to end with"
            else:
                turn.left.append(command.stop_ids[0])
                turn.reason = "stop_id"
        room = self.context_limit - len(branch.log)
        most = room if command.max_tokens is None else min(room, command.max_tokens)
        if len(turn.left) > most:
            turn.left, turn.reason = turn.left[:most], "max_tokens"
            if most != command.max_tokens:
                turn.message = f"the context limit of {self.context_limit} tokens"
        return turn

    def _fit(self, turn: _Turn, branch: _Branch, text: str) -> bool:
        """Runs the turn's grammar over the text; False when the turn's end is settled already."""
        grammar = turn.command.grammar
        if grammar is None:
            return True
        matcher = LLMatcher(self._vocabulary.llguidance, grammar.source, log_level=0)
        consumed = branch.log[len(branch.log) - grammar.consumed :]
        fitted = matcher.try_consume_tokens([*consumed, *turn.left]) - len(consumed)
        if matcher.is_error() or fitted < len(turn.left):
            fit = self._tokenizer.decode(turn.left[: max(0, fitted)], skip_special_tokens=False)
            turn.reason = "error"
            turn.message = f"the scripted text {text!r} does not fit the turn's grammar after {fit!r}"
            turn.left = turn.left[: max(0, fitted)]
        elif matcher.is_stopped():
            turn.reason = "grammar_end"
        elif not matcher.is_accepting():
            turn.reason = "error"
            turn.message = f"the scripted text {text!r} ends before the turn's grammar does"
        return turn.reason == "max_tokens"

    def _stop_early(self, turn: _Turn, branch: _Branch) -> None:
        begun = branch.log[len(branch.log) - turn.command.stop_consumed :]
        watch = StopWatch(turn.command.stop_strings, b"".join(self._vocabulary.token_bytes[token] for token in begun))
        for number, token in enumerate(turn.left):
            if watch.saw(number, self._vocabulary.token_bytes[token]):
                turn.left, turn.reason, turn.message = turn.left[: number + 1], "stop_string", ""
                return


@final
class _ServedLink:
    """The thread behind one link: answers commands as they come, and draws tokens when they are due."""

    def __init__(self, server: ScriptedServer, peer: socket.socket) -> None:
        self._server = server
        self._peer = peer
        self._numbers = itertools.count(1)
        self._sessions = itertools.count(1)
        self._orders = itertools.count()
        self._due: list[_Due] = []
        self._stopping = False
        self.branches: dict[int, _Branch] = {}
        self._thread = threading.Thread(target=self._run, name="agentspeed-scripted", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        with contextlib.suppress(OSError):  # the other side has gone first: the thread ends by itself
            self._peer.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=5.0)  # in either case: its branches are gone when it has ended, not before

    def _run(self) -> None:
        reader = command_reader()
        with self._peer:
            while not self._stopping:
                self._peer.settimeout(self._next_due())
                try:
                    data = self._peer.recv(1 << 16)
                except TimeoutError:
                    self._draw_due()
                    continue
                except OSError:
                    break
                if not data:
                    break
                reader.feed(data)
                for command in reader:
                    self._take(command)
        self.branches.clear()

    def _next_due(self) -> float | None:
        return max(1e-4, self._due[0].at - time.monotonic()) if self._due else None

    def _take(self, command: wire.Command) -> None:
        self._server.commands.append(command)
        try:
            reply, after = self._answer(command)
        except EngineFault as refused:
            reply, after = (
                wire.Failed(request=command.request, code=refused.code, message=refused.message, remedy=refused.remedy),
                (),
            )
        self._send(reply, *after)

    def _send(self, *messages: wire.Outgoing) -> None:
        try:
            self._peer.settimeout(None)
            self._peer.sendall(encode_outbox(messages))
        except OSError:
            self._stopping = True

    # ---- commands -------------------------------------------------------------------------------------------------
    def _answer(self, command: wire.Command) -> tuple[wire.Outgoing, tuple[wire.Outgoing, ...]]:
        """The reply, and events that leave in the same frame."""
        request = command.request
        match command:
            case wire.Hello():
                return self._server.welcome(request), ()
            case wire.GetStats():
                return wire.Stats(request=request, counts={"branches": len(self.branches)}, seconds={}), ()
            case wire.GetModelFiles():
                return self._server.files.listed(command), ()
            case wire.ReadModelFile():
                return self._server.files.part(command), ()
            case wire.Open():
                log = list(unpack_ids(command.ids))
                self._check_room(len(log))
                number = self._new(_Branch(session=next(self._sessions), parent=None, forked_at=0, log=log))
                return wire.Opened(request=request, branch=number, residence=wire.Residence()), ()
            case wire.Cancel():
                return self._cancel(command)
            case wire.Fork():
                return self._fork(command), ()
            case wire.Close():
                closed = self._branch(command.branch)
                ended = self._end(command.branch, "closed") if closed.running else ()
                del self.branches[command.branch]
                return wire.Done(request=request, known=len(closed.log)), ended
            case _:
                return self._at_rest(command)

    def _at_rest(self, command: wire.Command) -> tuple[wire.Outgoing, tuple[wire.Outgoing, ...]]:
        """Commands that need a branch without a running turn."""
        assert isinstance(command, wire.Append | wire.Generate | wire.Rewind | wire.Adopt | wire.Expect | wire.Inspect)
        branch = self._branch(command.branch)
        request = command.request
        if branch.running is not None and not isinstance(command, wire.Inspect):
            raise EngineFault("branch_busy", f"branch {command.branch} has a turn running")
        match command:
            case wire.Append():
                ids = unpack_ids(command.ids)
                self._check_room(len(branch.log) + len(ids))
                branch.log.extend(ids)
            case wire.Generate():
                validate_sampling(command.sampling)
                ids = unpack_ids(command.ids)
                self._check_room(len(branch.log) + len(ids), 0 if command.max_tokens == 0 else 1)
                branch.log.extend(ids)
                return wire.Done(request=request, known=len(branch.log)), self._start(command.branch, command)
            case wire.Rewind():
                if not 0 <= command.tokens <= len(branch.log):
                    raise EngineFault("position_unknown", f"position {command.tokens} is not in the log")
                self._cut(branch, command.tokens)
            case wire.Adopt():
                self._adopt(branch, command)
            case wire.Expect():
                until = None if command.seconds is None else time.monotonic() + command.seconds
                lease = wire.Lease(
                    keep="soft",
                    until=until,
                    seconds=command.seconds or 0.0,
                    residence=_residence(branch),
                    why="scripted",
                )
                return wire.LeaseAnswer(request=request, lease=lease), ()
            case wire.Inspect():
                state = "Decoding" if branch.running else "Held"
                return wire.Inspected(
                    request=request, state=state, known=len(branch.log), residence=_residence(branch), lease=None
                ), ()
        return wire.Done(request=request, known=len(branch.log)), ()

    def _fork(self, command: wire.Fork) -> wire.Forked:
        branch = self._branch(command.branch)
        at = len(branch.log) if command.at is None else command.at
        if command.n < 1 or not 0 <= at <= len(branch.log):
            raise EngineFault("invalid_request", f"cannot fork {command.n} children at {at}")
        limit = self._server.max_branches
        if command.n >= limit:
            raise EngineFault(
                "invalid_request",
                f"A fork into {command.n}: a session has at most {limit} branches, the one that is forked among them.",
                f"Ask for {limit - 1} children at most."
                if limit > 1
                else "Make the ScriptedEngine with a larger `max_branches`.",
            )
        if sum(other.session == branch.session for other in self.branches.values()) + command.n > limit:
            raise EngineFault("too_many_branches", f"A session has at most {limit} branches.", "Close some first.")
        numbers = tuple(
            self._new(
                _Branch(
                    session=branch.session,
                    parent=command.branch,
                    forked_at=len(branch.log),
                    log=branch.log[:at],
                    computed=min(branch.computed, at),
                    turns=branch.turns,
                )
            )
            for _ in range(command.n)
        )
        return wire.Forked(request=command.request, branches=numbers, known=at)

    def _adopt(self, trunk: _Branch, command: wire.Adopt) -> None:
        child = self._branch(command.child)
        if child.parent != command.branch:
            raise EngineFault("child_unrelated", f"branch {command.child} is not a child of {command.branch}")
        if child.running is not None:
            raise EngineFault("branch_busy", f"branch {command.child} has a turn running")
        if child.forked_at != len(trunk.log):
            raise EngineFault("trunk_moved", f"branch {command.branch} went on after the fork")
        trunk.log, trunk.computed, trunk.turns = child.log, child.computed, child.turns
        del self.branches[command.child]

    def _cancel(self, command: wire.Cancel) -> tuple[wire.Outgoing, tuple[wire.Outgoing, ...]]:
        branch = self._branch(command.branch)
        ended = self._end(command.branch, "cancelled") if branch.running else ()
        if command.cut is not None:
            self._cut(branch, command.cut)
        return wire.Done(request=command.request, known=len(branch.log)), ended

    # ---- turns ----------------------------------------------------------------------------------------------------
    def _start(self, number: int, command: wire.Generate) -> tuple[wire.Outgoing, ...]:
        branch = self.branches[number]
        turn = self._server.write(branch, command)
        branch.computed = len(branch.log)
        started = wire.TurnStarted(branch=number, usage=turn.usage)
        branch.running = turn
        if turn.seconds and turn.left:
            self._later(number, turn)
            return (started,)
        events = self._draw(number, len(turn.left)) if turn.left else ()
        return (started, *events, *self._end(number, turn.reason))

    def _later(self, number: int, turn: _Turn) -> None:
        heapq.heappush(self._due, _Due(time.monotonic() + turn.seconds, next(self._orders), number, turn))

    def _draw_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0].at <= now:
            due = heapq.heappop(self._due)
            branch = self.branches.get(due.branch)
            if branch is None or branch.running is not due.turn:
                continue  # cancelled or closed meanwhile
            events = self._draw(due.branch, 1)
            if due.turn.left:
                self._later(due.branch, due.turn)
            else:
                events = (*events, *self._end(due.branch, due.turn.reason))
            self._send(*events)

    def _draw(self, number: int, count: int) -> tuple[wire.Outgoing, ...]:
        branch = self.branches[number]
        turn = branch.running
        assert turn is not None
        ids, turn.left = turn.left[:count], turn.left[count:]
        branch.log.extend(ids)
        turn.drawn += len(ids)
        most = turn.command.sampling.logprobs
        return (
            wire.Tokens(
                branch=number,
                ids=pack_ids(ids),
                logprobs=() if most is None else (_CERTAIN,) * len(ids),
                top=tuple(self._server.most_likely(drawn, most) for drawn in ids) if most else (),
            ),
        )

    def _end(self, number: int, reason: wire.FinishReason) -> tuple[wire.Outgoing, ...]:
        branch = self.branches[number]
        turn = branch.running
        assert turn is not None
        branch.running = None
        branch.computed = max(0, len(branch.log) - 1)
        usage = wire.TurnUsage(new=turn.usage.new, resumed_device=turn.usage.resumed_device, drawn=turn.drawn)
        message = turn.message if reason in ("error", "max_tokens") else ""
        return (wire.TurnEnded(branch=number, reason=reason, known=len(branch.log), usage=usage, message=message),)

    # ---- branches -------------------------------------------------------------------------------------------------
    def _new(self, branch: _Branch) -> int:
        number = next(self._numbers)
        self.branches[number] = branch
        return number

    def _branch(self, number: int) -> _Branch:
        branch = self.branches.get(number)
        if branch is None:
            raise EngineFault("branch_unknown", f"there is no branch {number}")
        return branch

    def _check_room(self, known: int, least: int = 0) -> None:
        if known + least > self._server.context_limit:
            raise EngineFault(
                "context_overflow",
                f"{known} tokens leave no room in a context of {self._server.context_limit}.",
                "Rewind, start a new session, or serve the model with a larger context limit.",
            )

    @staticmethod
    def _cut(branch: _Branch, tokens: int) -> None:
        del branch.log[tokens:]
        branch.computed = min(branch.computed, tokens)


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelBroken(f"{folder} has no tokenizer.json.", remedy="Give a complete model folder.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise ModelBroken(f"{path} is not a tokenizer: {error}.", remedy="Export it anew.") from error


def _limit_of(folder: Path) -> int:
    """What the model's configuration says, as far as it can be read: a script needs none."""
    try:
        limit = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, LookupError, TypeError):
        return _NO_LIMIT
    return limit if isinstance(limit, int) and limit > 0 else _NO_LIMIT


def _residence(branch: _Branch) -> wire.Residence:
    return wire.Residence(device=branch.computed, lost=len(branch.log) - branch.computed)
