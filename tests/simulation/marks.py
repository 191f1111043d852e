"""Names for rare paths. Each is read off what one call of the core did, so production code knows nothing of marks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.core import Core

_ACTIVE = ("Promoting", "Prefilling", "Decoding")


@final
@dataclass(frozen=True, slots=True)
class Glance:
    """The core's state in a few numbers, before and after each call."""

    states: dict[int, str]
    counters: dict[str, int]

    @classmethod
    def at(cls, core: Core) -> Glance:
        world = core.world
        return cls(
            {number: type(state).__name__ for number, state in world.states.items()},
            {
                "preemptions": world.preemptions,
                "ignored": world.ignored,
                "evicted": world.evicted_pages,
                "copied": world.copied_pages,
                "saved": world.saved_pages,
                "loaded": world.loaded_pages,
                "prefetched": world.prefetched,
                "late": world.late_tickets,
                "tickets": world.next_ticket,
                "reshaped": sum(world.kv.is_stale(*one) for one in world.kv.rooms.items()),
                "joined": len(world.fill_of),
                "queued": len(world.queue),
                "free": world.kv.pages.free,
                "full": len(world.over_quota),
                "ahead": sum(room.issued > world.kv.branches[number].known for number, room in world.kv.rooms.items()),
            },
        )


@final
@dataclass(frozen=True, slots=True)
class Event:
    """One call of the core: what was asked, what moved, what was said."""

    now: float
    call: str
    """handle | plan | apply | copied | drop_link | reopen"""
    what: str
    """The command's name, or what was called with."""
    branch: int
    """Of the command; 0 for other calls."""
    before: Glance
    after: Glance
    said: tuple[wire.Outgoing, ...] = ()

    def moves(self) -> Iterator[tuple[int, str, str]]:
        """(branch, state before, state after) of every branch that changed; "" is one that does not exist."""
        for number in sorted(self.before.states.keys() | self.after.states.keys()):
            was, is_ = self.before.states.get(number, ""), self.after.states.get(number, "")
            if was != is_:
                yield number, was, is_

    def moved(self, was: tuple[str, ...], to: tuple[str, ...]) -> bool:
        return any(before in was and after in to for _, before, after in self.moves())

    def more(self, counter: str) -> bool:
        return self.after.counters[counter] > self.before.counters[counter]

    def found(self, what: str, state: str) -> bool:
        """The command `what` met its branch in `state`."""
        return self.call == "handle" and self.what == what and self.before.states.get(self.branch) == state

    def heard(self, kind: type[Any], test: Callable[[Any], bool] = lambda _: True) -> bool:
        return any(isinstance(message, kind) and test(message) for message in self.said)

    def __str__(self) -> str:
        moves = " ".join(f"{number}:{was or '-'}>{to or '-'}" for number, was, to in self.moves())
        said = " ".join(_said(message) for message in self.said)
        return f"{self.now:10.4f} {self.call:9} {self.what:14} {moves} {said}".rstrip()


def _said(message: wire.Outgoing) -> str:
    name = type(message).__name__
    match message:
        case wire.Tokens(branch=branch):
            return f"{name}({branch})"
        case wire.TurnEnded(branch=branch, reason=reason, known=known):
            return f"{name}({branch} {reason} {known})"
        case wire.Failed(code=code):
            return f"{name}({code})"
        case wire.LeaseAnswer(lease=lease):
            return f"{name}({lease.keep})"
        case _:
            return name


def _failed(code: str) -> Callable[[Event], bool]:
    return lambda event: event.heard(wire.Failed, lambda failed: failed.code == code)


_RULES: dict[str, tuple[str, Callable[[Event], bool]]] = {
    "preempted": (
        "an older turn takes the room of a younger one",
        lambda e: e.call == "plan" and e.moved(_ACTIVE, ("Queued",)),
    ),
    "preempted-in-flight": (
        "preempted while its rows are in a step",
        lambda e: e.call == "plan" and e.moved(_ACTIVE, ("Settling",)),
    ),
    "preempted-promoting": (
        "preempted while its rows come from the host",
        lambda e: e.call == "plan" and e.moved(("Promoting",), ("Queued",)),
    ),
    "gave-its-room-back": (
        "a turn that cannot grow and has nobody younger waits again",
        lambda e: e.heard(wire.TurnEnded, lambda m: m.usage.why.startswith("gave its room back")),
    ),
    "abort-queued": ("a turn that waits is cancelled", lambda e: e.found("Cancel", "Queued")),
    "abort-promoting": ("cancelled while rows come from the host", lambda e: e.found("Cancel", "Promoting")),
    "abort-between-steps": (
        "an active turn is cancelled with nothing in flight",
        lambda e: e.what == "Cancel" and e.moved(("Prefilling", "Decoding"), ("Held",)),
    ),
    "abort-prefilling-in-flight": (
        "cancelled while a chunk of its prompt is in a step",
        lambda e: e.what == "Cancel" and e.moved(("Prefilling",), ("Settling",)),
    ),
    "abort-decoding-in-flight": (
        "cancelled while its token is being drawn",
        lambda e: e.what == "Cancel" and e.moved(("Decoding",), ("Settling",)),
    ),
    "abort-while-settling": ("cancelled while it already lets go", lambda e: e.found("Cancel", "Settling")),
    "gone-in-flight": (
        "the client dies while rows are in a step",
        lambda e: e.call == "drop_link" and e.moved(_ACTIVE, ("Settling",)),
    ),
    "gone-while-settling": (
        "the client dies while its branch lets go",
        lambda e: e.call == "drop_link" and "Settling" in e.before.states.values(),
    ),
    "gone-queued": (
        "the client dies while its turn waits",
        lambda e: e.call == "drop_link" and e.moved(("Queued",), ("",)),
    ),
    "gone-promoting": (
        "the client dies while rows come from the host",
        lambda e: e.call == "drop_link" and e.moved(("Promoting",), ("",)),
    ),
    "fork-queued": ("a waiting turn is forked", lambda e: e.found("Fork", "Queued")),
    "fork-while-loading": ("forked while rows come from the host", lambda e: e.found("Fork", "Promoting")),
    "fork-in-flight": (
        "forked while its rows are in a step",
        lambda e: e.what == "Fork" and e.moved(("Prefilling", "Decoding"), ("Settling",)),
    ),
    "fork-while-settling": ("forked while it already lets go", lambda e: e.found("Fork", "Settling")),
    "ran-ahead": ("a row is issued for a token that is in flight", lambda e: e.call == "plan" and e.more("ahead")),
    "ended-before-a-row-ahead": (
        "a turn ends with a token whose row is in flight already",
        lambda e: e.call == "apply" and e.moved(("Decoding",), ("Settling",)),
    ),
    "settled-by-ack": (
        "the last row of a branch that left comes back, and its room goes",
        lambda e: e.call == "apply" and e.moved(("Settling",), ("Held", "Queued", "")),
    ),
    "split-under-a-pin": (
        "a command splits rows that a running turn reads",
        lambda e: e.call == "handle" and e.more("reshaped"),
    ),
    "waits-for-a-sibling": ("a turn waits for another to compute what both need", lambda e: e.more("joined")),
    "shared-new-rows": (
        "rows new to a session were computed by another one",
        lambda e: e.heard(wire.TurnStarted, lambda m: m.usage.shared > 0),
    ),
    "seed-copied": ("a child pays its page", lambda e: e.more("copied")),
    "evicted": ("cached rows go for a running turn", lambda e: e.more("evicted")),
    "recomputed": (
        "a paused session lost rows and computes them again",
        lambda e: e.heard(wire.TurnStarted, lambda m: m.usage.recomputed > 1),
    ),
    "victim-saved": ("rows reach the host", lambda e: e.more("saved")),
    "resumed-from-host": (
        "a paused session comes back from the host",
        lambda e: e.heard(wire.TurnStarted, lambda m: m.usage.resumed_host > 0),
    ),
    "prefetched": ("rows come back before their tool does", lambda e: e.more("prefetched")),
    "load-landed": (
        "a turn's rows came from the host",
        lambda e: e.call == "copied" and e.moved(("Promoting",), ("Prefilling",)),
    ),
    "load-failed": (
        "a turn waits for a load, which fails",
        lambda e: e.moved(("Promoting",), ("Queued",)) and e.what.endswith("failed"),
    ),
    "save-failed": ("a copy to the host fails", lambda e: e.what == "save failed"),
    "ticket-deadline-passed": ("a copy is not heard of in time", lambda e: e.more("late")),
    "late-copy-ack": ("a copy is reported after its deadline", lambda e: e.call == "copied" and e.more("ignored")),
    "pool-empty": (
        "turns wait and no page is free",
        lambda e: e.call == "plan" and e.after.counters["queued"] > 0 and e.after.counters["free"] == 0,
    ),
    "quota-waited": (
        "a tenant's turn waits for the tenant's own pages, while the pool has some",
        lambda e: e.call == "plan" and e.after.counters["full"] > 0 and e.after.counters["free"] > 0,
    ),
    "firm-granted": ("a firm lease is granted", lambda e: e.heard(wire.LeaseAnswer, lambda m: m.lease.keep == "firm")),
    "firm-refused": (
        "a firm lease is answered soft",
        lambda e: e.heard(wire.LeaseAnswer, lambda m: "firm refused" in m.lease.why),
    ),
    "lease-changed": ("a soft lease loses rows, and its holder hears why", lambda e: e.heard(wire.LeaseChanged)),
    "adopted": ("a child becomes the trunk", lambda e: e.what == "Adopt" and e.heard(wire.Done)),
    "turn-refused": (
        "a turn cannot go on and says why",
        lambda e: e.heard(wire.TurnEnded, lambda m: m.reason == "error"),
    ),
    "refused-sessions": ("no session is left to open", _failed("too_many_sessions")),
    "refused-branches": (
        "a session would have more branches than it may",
        lambda event: event.heard(wire.Failed, lambda failed: " branches" in failed.message),
    ),
    "refused-waiting": ("the queue is full", _failed("overloaded")),
    "refused-quota": ("a tenant has all it may have", _failed("quota_exceeded")),
    "refused-overflow": ("a turn does not fit into the context", _failed("context_overflow")),
    "reopened": ("an engine dies and sessions are opened again from their ids", lambda e: e.call == "reopen"),
}

MARKS: dict[str, str] = {name: why for name, (why, _) in _RULES.items()}


def marks_of(event: Event) -> Iterator[str]:
    """The rare paths that one event took."""
    for name, (_, rule) in _RULES.items():
        if rule(event):
            yield name
