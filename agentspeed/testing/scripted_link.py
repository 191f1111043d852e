"""The engine's side of one link without a model: a thread that answers frames and draws what the script wrote."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from agentspeed.testing.scripted_model import CERTAIN, RunningTurn, ScriptedBranch, ScriptedModel
from agentspeed_engine.errors import EngineFault
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import command_reader, encode_outbox
from agentspeed_engine.protocol.sampling import validate_sampling
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.serve.model_files import ServedFiles


@dataclass(order=True, slots=True)
class _Due:
    at: float
    order: int
    branch: int = field(compare=False)
    turn: RunningTurn = field(compare=False)


@final
class ScriptedLink:
    """The thread behind one link: answers commands as they come, and draws tokens when they are due."""

    def __init__(
        self,
        peer: socket.socket,
        model: ScriptedModel,
        files: ServedFiles,
        *,
        max_branches: int,
        welcome: Callable[[int], wire.Welcome],
        heard: Callable[[wire.Command], None],
    ) -> None:
        """`heard` is told every command as it arrives."""
        self._peer = peer
        self._model = model
        self._files = files
        self._max_branches = max_branches
        self._welcome = welcome
        self._heard = heard
        self._numbers = itertools.count(1)
        self._sessions = itertools.count(1)
        self._orders = itertools.count()
        self._due: list[_Due] = []
        self._stopping = False
        self.branches: dict[int, ScriptedBranch] = {}
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
        self._heard(command)
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
                return self._welcome(request), ()
            case wire.GetStats():
                return wire.Stats(request=request, counts={"branches": len(self.branches)}, seconds={}), ()
            case wire.GetModelFiles():
                return self._files.listed(command), ()
            case wire.ReadModelFile():
                return self._files.part(command), ()
            case wire.Open():
                log = list(unpack_ids(command.ids))
                self._check_room(len(log))
                number = self._new(ScriptedBranch(session=next(self._sessions), parent=None, forked_at=0, log=log))
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
                validate_sampling(command.sampling, self._model.vocab_size)
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
        limit = self._max_branches
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
                ScriptedBranch(
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

    def _adopt(self, trunk: ScriptedBranch, command: wire.Adopt) -> None:
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
        turn = self._model.write(branch, command)
        branch.computed = len(branch.log)
        started = wire.TurnStarted(branch=number, usage=turn.usage)
        branch.running = turn
        if turn.seconds and turn.left:
            self._later(number, turn)
            return (started,)
        events = self._draw(number, len(turn.left)) if turn.left else ()
        return (started, *events, *self._end(number, turn.reason))

    def _later(self, number: int, turn: RunningTurn) -> None:
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
                logprobs=() if most is None else (CERTAIN,) * len(ids),
                top=tuple(self._model.most_likely(drawn, most) for drawn in ids) if most else (),
                draw_logprobs=() if most is None else (CERTAIN,) * len(ids),
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
    def _new(self, branch: ScriptedBranch) -> int:
        number = next(self._numbers)
        self.branches[number] = branch
        return number

    def _branch(self, number: int) -> ScriptedBranch:
        branch = self.branches.get(number)
        if branch is None:
            raise EngineFault("branch_unknown", f"there is no branch {number}")
        return branch

    def _check_room(self, known: int, least: int = 0) -> None:
        if known + least > self._model.context_limit:
            raise EngineFault(
                "context_overflow",
                f"{known} tokens leave no room in a context of {self._model.context_limit}.",
                "Rewind, start a new session, or serve the model with a larger context limit.",
            )

    @staticmethod
    def _cut(branch: ScriptedBranch, tokens: int) -> None:
        del branch.log[tokens:]
        branch.computed = min(branch.computed, tokens)


def _residence(branch: ScriptedBranch) -> wire.Residence:
    return wire.Residence(device=branch.computed, lost=len(branch.log) - branch.computed)
