"""How a session shows itself: in one line, and with its children as a tree."""

from __future__ import annotations

import time

from agentspeed._base.wording import counted
from agentspeed._core.session_core import SessionCore


def in_a_line(core: SessionCore) -> str:
    """Its name and place, what it has cost, where its rows are, and what it does."""
    turns = counted(core.usage.turns, "turn")
    rows = core.branch.residence.within(core.tokens)
    where = f"{core.tokens} tok ({rows.device + rows.host} cached)"
    return f"{core.id} {core.path} · {turns} · {where} · {_state(core, rows.host)}"


def tree(core: SessionCore) -> str:
    """The session and its children that are open, a line each."""
    lines = [f"<Session {in_a_line(core)}>"]
    for child in core.children:
        if child.state == "open":
            lines += [f"  {line}" for line in tree(child).splitlines()]
    return "\n".join(lines)


def _state(core: SessionCore, on_host: int) -> str:
    if core.state != "open":
        return core.state
    if core.busy is not None and not core.pending.on:
        return "running"
    lease = core.branch.lease
    kept = f", {lease.keep} lease" if lease is not None else ""
    if lease is not None and lease.seconds:
        kept += f" {lease.seconds:g}s"
    if on_host:
        kept += f", {on_host} tok on host"
    since = "" if core.rested_at is None else f" {time.monotonic() - core.rested_at:.1f}s"
    return f"held{since}{kept}"
