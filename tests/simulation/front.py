"""What an agent holds in its hand: a branch, its mirrored ids, and the effects an agent may ask the world for."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar, final

from agentspeed_engine.ids import BranchId, LinkId
from agentspeed_engine.protocol import messages as wire
from tests.simulation.device import Mirror

if TYPE_CHECKING:
    from tests.simulation.agents import Agent


@final
@dataclass(slots=True, eq=False)
class Handle:
    """One branch as its front knows it. It outlives the engine: its ids are enough to open it again."""

    link: LinkId
    mirror: Mirror = field(default_factory=Mirror)
    number: BranchId | None = None
    """None: not open in the engine that runs now."""
    private: bool = False
    tenant: str = ""
    running: bool = False
    before: int = 0
    """Ids it knew before the turn that runs."""
    ended: wire.TurnEnded | None = None
    started_at: float = 0.0
    born: list[Handle] = field(default_factory=list["Handle"])
    """Children of its last fork."""

    @property
    def known(self) -> int:
        return len(self.mirror.ids)

    def __repr__(self) -> str:
        return f"<branch {self.number}, {self.known} ids{', running' if self.running else ''}>"


@final
@dataclass(frozen=True, slots=True)
class Ask:
    """One command about a handle, answered by its reply; `Died` when the engine went away meanwhile."""

    handle: Handle
    command: wire.Command


@final
@dataclass(frozen=True, slots=True)
class Ends:
    """Waits for the end of the handle's turn."""

    handle: Handle


@final
@dataclass(frozen=True, slots=True)
class Sleep:
    """The agent's own time: thinking, or waiting before it tries again."""

    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Tool:
    """A tool call. It may never return."""

    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Start:
    """Another agent of the same client."""

    agent: Agent


@final
@dataclass(frozen=True, slots=True)
class Join:
    """Waits until these agents are done."""

    agents: tuple[Agent, ...]


@final
@dataclass(frozen=True, slots=True)
class Alone:
    """Asks whether all other kinds of agents are done."""


@final
@dataclass(frozen=True, slots=True)
class Died:
    """The engine died before it answered."""


Effect: TypeAlias = Ask | Ends | Sleep | Tool | Start | Join | Alone
Answer: TypeAlias = wire.Outgoing | Died | bool | None
_T = TypeVar("_T")
Script: TypeAlias = Generator[Effect, Answer, _T]
