"""What the engine raises: refusals, which travel as codes of the protocol, and broken rules, which end it."""

from __future__ import annotations

from agentspeed_engine.protocol.codes import Code, EngineFault

__all__ = ["BrokenInvariant", "Code", "EngineFault"]


class BrokenInvariant(AssertionError):
    """Our bug: a rule of the ownership machines does not hold. The engine stops; nothing swallows it."""
