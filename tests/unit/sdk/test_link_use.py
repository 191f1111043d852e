"""Whether a link is used is known from what passes over it."""

from __future__ import annotations

from agentspeed.server.link_use import TOOL_SECONDS, LinkUse
from agentspeed_engine.protocol import messages as wire


def opened() -> LinkUse:
    use = LinkUse()
    use.heard((wire.Opened(request=1, branch=7, residence=wire.Residence()),), 100.0)
    return use


def ended(branch: int = 7) -> wire.TurnEnded:
    return wire.TurnEnded(branch=branch, reason="stop", known=3, usage=wire.TurnUsage())


def test_a_link_without_branches_rests() -> None:
    assert LinkUse().rests(0.0)
    use = opened()
    use.told(wire.Close(request=2, branch=7))
    assert use.rests(100.0)


def test_a_turn_runs_from_its_request_to_its_end_or_refusal() -> None:
    use = opened()
    use.told(wire.Generate(request=2, branch=7))
    use.told(wire.Generate(request=3, branch=7))
    use.heard((wire.Done(request=2, known=3), wire.Failed(request=3, code="busy", message="")), 101.0)
    assert not use.rests(1000.0)
    use.heard((ended(),), 200.0)
    assert use.rests(200.0 + TOOL_SECONDS)


def test_between_two_turns_a_client_has_time_for_a_tool() -> None:
    use = opened()
    use.told(wire.Generate(request=2, branch=7))
    use.heard((wire.Done(request=2, known=3), ended()), 200.0)
    assert not use.rests(200.0 + TOOL_SECONDS - 1)
    assert use.rests(200.0 + TOOL_SECONDS)


def test_children_are_branches_and_one_that_was_adopted_or_closed_is_none() -> None:
    use = LinkUse()
    use.heard((wire.Forked(request=1, branches=(8, 9), known=3),), 1.0)
    use.told(wire.Adopt(request=2, branch=7, child=8))
    use.told(wire.Generate(request=3, branch=9))
    assert not use.rests(1000.0)
    use.told(wire.Close(request=4, branch=9))
    assert use.rests(1000.0)
