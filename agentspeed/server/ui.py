"""`GET /ui`: a page that shows the live tree of sessions and branches, and the picture that it reads."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

from agentspeed import errors
from agentspeed.engine import Engine
from agentspeed.transport.base import wire

MOST_BRANCHES: Final = 400
_PATIENCE: Final = 5.0


def page() -> bytes:
    """The page; it holds no data."""
    return files("agentspeed.server").joinpath("static", "ui.html").read_bytes()


async def picture(engine: Engine, tenant: str, *, everyone: bool) -> dict[str, Any]:
    """What the engine holds now: sessions with their branches, pages by owner, counts. A tenant sees its own sessions;
    `everyone` is for a server without keys."""
    link = await engine.link()
    seen = await link.call(lambda number: wire.Look(request=number, branches=MOST_BRANCHES), patience=_PATIENCE)
    if not isinstance(seen, wire.Picture):
        raise errors.InternalError(f"The engine answered Look with {type(seen).__name__}.")
    sessions = [
        {
            "session": session.session,
            "label": session.label,
            "tenant": session.tenant,
            "branches_total": session.branches_total,
            "branches": [_branch(branch) for branch in session.branches],
        }
        for session in seen.sessions
        if everyone or session.tenant == tenant
    ]
    return {"clock": seen.clock, "sessions": sessions, "pages": seen.pages, "slots": seen.slots, "counts": seen.counts}


def _branch(branch: wire.BranchView) -> dict[str, Any]:
    places = branch.places
    return {
        "branch": branch.branch,
        "parent": branch.parent,
        "state": branch.state,
        "known": branch.known,
        "places": {name: getattr(places, name) for name in type(places).__struct_fields__},
        "lease": None if branch.lease is None else {"keep": branch.lease.keep, "why": branch.lease.why},
        "tool": branch.tool,
        "tail_pages": branch.tail_pages,
        "age": branch.age,
        "drawn": branch.drawn,
        "since": round(branch.since, 3),
        "waiting_for": branch.waiting_for,
    }
