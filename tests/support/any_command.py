"""Commands drawn at random, of those the branches of a core can have: for tests of what must hold whatever comes."""

from __future__ import annotations

import random
from collections.abc import Sequence

from agentspeed_engine.kv.branch_states import Held
from agentspeed_engine.protocol import messages as wire
from tests.support.scheduled import Scheduled


def any_command(world: Scheduled, chance: random.Random, tenants: Sequence[str] = ("",)) -> None:
    """A command that some branch at rest can have, or a new session."""
    resting = [number for number, state in world.core.world.states.items() if isinstance(state, Held)]
    verbs = ("open", "start", "start", "start", "expect", "expect", "fork", "rewind", "close")
    verb = "open" if len(resting) < 3 else chance.choice(verbs)
    if verb == "open":
        if len(world.core.world.sessions) == world.core.config.max_sessions:
            return
        start = chance.randrange(3)
        _ = world.open(
            [(start * 40 + number) % 90 for number in range(chance.randrange(1, 24))], tenant=chance.choice(tenants)
        )
        return
    branch = chance.choice(resting)
    known = len(world.logs[branch])
    if verb == "start" and known < 24:
        _ = world.start(
            branch, [chance.randrange(90) for _ in range(chance.randrange(1, 6))], most=chance.choice((0, 1, 1, 6))
        )
    elif verb == "expect":
        _ = world.send(
            wire.Expect(
                request=1,
                branch=branch,
                seconds=chance.choice((0.5, 5.0, 60.0)),
                keep=chance.choice(("soft", "soft", "firm")),
            )
        )
    elif verb == "fork":
        forked = world.send(wire.Fork(request=1, branch=branch, n=2))
        if isinstance(forked, wire.Forked):
            world.logs |= {child: list(world.logs[branch]) for child in forked.branches}
    elif verb == "rewind":
        cut = chance.randrange(known + 1)
        _ = world.send(wire.Rewind(request=1, branch=branch, tokens=cut))
        del world.logs[branch][cut:]
    elif verb == "close":
        _ = world.send(wire.Close(request=1, branch=branch))
