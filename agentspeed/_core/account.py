"""What a run has spent, by session: its own turns and calls, and those of all that its tools use meanwhile.

A run's account is found through the context that its tools run in, also in worker threads: so a fork, a sub-agent or
any other session that a tool uses spends from it, and from the accounts of the runs around that run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, final

import msgspec

from agentspeed.limits import Limits, Reached
from agentspeed.transport.base import wire
from agentspeed.usage import Usage

_CURRENT: Final[ContextVar[Account | None]] = ContextVar("account", default=None)


@final
class Account:
    """One for each run, which enters it; turns find it by themselves."""

    def __init__(self, limits: Limits, session_id: str) -> None:
        self.by_branch: dict[str, Usage] = {}
        """Of turns that have ended, by the id of their session."""
        self.drawn: Counter[str] = Counter()
        """Tokens, also of turns that run."""
        self.calls: Counter[str] = Counter()
        self._limits = limits
        self._owner = session_id
        self._outer: Account | None = None
        self._ended = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While the block runs, all that is begun in it spends from this account; what outlives it spends from none."""
        self._outer = _CURRENT.get()
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            self._ended = True
            _CURRENT.reset(token)

    def chain(self) -> Iterator[Account]:
        """This account, and those around it."""
        account: Account | None = self
        while account is not None:
            if not account._ended:
                yield account
            account = account._outer

    # ---- tokens ---------------------------------------------------------------------------------------------------
    @property
    def counts_tokens(self) -> bool:
        return any(one._limits.tokens is not None or one._limits.branch_tokens is not None for one in self.chain())

    def left(self, session_id: str) -> tuple[int, Reached] | None:
        """How many tokens the session may still draw, less than 0 when turns at once drew too many, and the limit that
        says so; None: any number."""
        return min(
            (bound for one in self.chain() for bound in one._own_left(session_id)),
            key=lambda bound: bound[0],
            default=None,
        )

    def _own_left(self, session_id: str) -> Iterator[tuple[int, Reached]]:
        if (most := self._limits.tokens) is not None:
            yield most - self.drawn.total(), Reached("tokens", most, self._owner, dict(self.drawn))
        if (most := self._limits.branch_tokens) is not None:
            own = self.drawn[session_id]
            yield most - own, Reached("branch_tokens", most, self._owner, {session_id: own})

    # ---- calls and seconds ----------------------------------------------------------------------------------------
    def calls_left(self) -> tuple[int, Reached] | None:
        """How many tool calls may still be run; None: any number."""
        bounds = [
            (most - one.calls.total(), Reached("tool_calls", most, one._owner, dict(one.calls)))
            for one in self.chain()
            if (most := one._limits.tool_calls) is not None
        ]
        return min(bounds, key=lambda bound: bound[0], default=None)

    def take_calls(self, session_id: str, calls: int) -> None:
        for one in self.chain():
            one.calls[session_id] += calls

    def out_of_time(self) -> Reached:
        """That this account's own seconds have gone."""
        return Reached("seconds", self._limits.seconds or 0.0, self._owner, {})


@final
class Charge:
    """What one turn spends."""

    def __init__(self, account: Account, session_id: str) -> None:
        self.bound: Reached | None = None
        """The limit that gave the turn fewer tokens than it was asked for."""
        self._account = account
        self._session_id = session_id
        self._counts = account.counts_tokens
        self._drawn = 0

    @classmethod
    def begun(cls, session_id: str) -> Charge | None:
        """None outside of every run. Raises `LimitReached` where no token is left."""
        account = _CURRENT.get()
        if account is None or next(account.chain(), None) is None:
            return None
        if (bound := account.left(session_id)) is not None and bound[0] < 1:
            raise bound[1].error()
        return cls(account, session_id)

    def bounded(self, command: wire.Generate) -> wire.Generate:
        """With at most the tokens that are left."""
        bound = self._account.left(self._session_id)
        if bound is None or (command.max_tokens is not None and command.max_tokens <= bound[0]):
            return command
        self.bound = bound[1]
        return msgspec.structs.replace(command, max_tokens=max(1, bound[0]))

    def drew(self, tokens: int) -> None:
        """While the turn runs."""
        if self._counts:
            self._drawn += tokens
            self._count(tokens)

    def over(self) -> Reached | None:
        """The limit that turns at once have drawn more than, together: this one may not go on."""
        bound = self._account.left(self._session_id) if self._counts else None
        return bound[1] if bound is not None and bound[0] < 0 else None

    def now(self) -> Reached | None:
        """The limit that cut the turn, with what has been spent by now."""
        if self.bound is None:
            return None
        bound = self._account.left(self._session_id)
        return self.bound if bound is None else bound[1]

    def settle(self, usage: Usage) -> None:
        """The turn has ended, and this is what it cost."""
        self._count(max(0, usage.drawn - self._drawn))
        for one in self._account.chain():
            one.by_branch[self._session_id] = one.by_branch.get(self._session_id, Usage()) + usage

    def _count(self, tokens: int) -> None:
        for one in self._account.chain():
            one.drawn[self._session_id] += tokens


def prefilled(session_id: str, usage: Usage) -> None:
    """Rows that were computed without a turn."""
    if (account := _CURRENT.get()) is not None:
        Charge(account, session_id).settle(usage)
