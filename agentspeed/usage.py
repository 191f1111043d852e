"""What turns cost, as values that add up, and what the engine says of a session or of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens and seconds of one turn, or of several added up.

    `new + resumed_device + resumed_host + recomputed` are the tokens known before the first draw of each turn."""

    new: int = 0
    """Tokens that are new to this session's log; `shared` of them were computed already, by another session or by a
    turn that was taken back."""
    resumed_device: int = 0
    resumed_host: int = 0
    recomputed: int = 0
    """Tokens whose rows had been lost; `why` says to what."""
    shared: int = 0
    drawn: int = 0
    preempted: int = 0
    turns: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    pauses: int = 0
    pause_seconds: float = 0.0
    """Time the branch was held while tools ran."""
    why: str = ""

    @property
    def resumed(self) -> int:
        """Tokens that cost nothing because the session kept them."""
        return self.resumed_device + self.resumed_host

    @property
    def prefill_saved(self) -> int:
        """Tokens of prompts that no turn had to compute: kept by this session or computed by another."""
        return self.resumed + self.shared

    @property
    def computed(self) -> int:
        """Rows really computed: new ones nobody shared, lost ones, drawn ones."""
        return self.new - self.shared + self.recomputed + self.drawn

    def __add__(self, other: Usage) -> Usage:
        numbers = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name != "why"
        }
        return Usage(**numbers, why=other.why or self.why)

    def __sub__(self, earlier: Usage) -> Usage:
        """What came since `earlier`, a former value of the same account."""
        numbers = {
            field.name: getattr(self, field.name) - getattr(earlier, field.name)
            for field in fields(self)
            if field.name != "why"
        }
        return Usage(**numbers, why=self.why)

    def __repr__(self) -> str:
        """Only what is not zero; seconds to three digits."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return f"Usage({', '.join(f'{name}={_short(value)}' for name, value in values if value)})"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """How far the start of an engine is, as `on_start` is told."""

    text: str
    """What it does, in words."""
    part: float | None
    """What part of the weights was read, from 0 to 1; None before that begins, and where an engine does not say."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """Where the rows of a session's tokens are: how many tokens' rows are on the device, on the host alone, nowhere.

    Together they are the session's tokens. The row of the newest is computed by the next turn, so it counts as lost."""

    device: int
    host: int
    lost: int

    def within(self, tokens: int) -> Residence:
        """The same for the first `tokens` of them; what is beyond all three was never computed."""
        device = min(self.device, tokens)
        host = min(self.host, tokens - device)
        return Residence(device=device, host=host, lost=tokens - device - host)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What the engine promised about a session at rest."""

    keep: str
    """`soft` may be revoked (LeaseChanged says why); `firm` never is before its end, or the session's own next turn."""
    seconds: float
    """Granted from the moment of the answer; what the engine expects where nobody said for how long."""
    residence: Residence
    why: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What the engine said of a session when it was asked."""

    state: str
    """Of its branch: Held, Queued, Promoting, Prefilling, Decoding or Settling (docs/reference/states.md)."""
    known: int
    """Tokens that the engine knows of its log."""
    residence: Residence
    lease: Lease | None
    waiting_for: str
    """What its turn waits for; empty for one that waits for nothing."""
    tenant_pages: int
    """Device pages of its tenant, all its sessions and cached rows together."""
    tenant_quota: int | None
    """The most that its tenant may have; None: no quota."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Numbers of a whole engine, by name. An engine may say more than these, and says them all."""

    counts: Mapping[str, int]
    """Now: `sessions`, `branches` (and `branches_held`, `branches_decoding`, one for each state), `waiting_turns`,
    `pages_total`, `pages_free`, `pages_firm`, `slots_total`, `slots_free`, `links`. Since the start: `steps`,
    `tokens_drawn`, `rows_computed`, `preemptions`, `pages_evicted`, `pages_saved`, `pages_loaded`."""
    seconds: Mapping[str, float]
    """Since the start, spent by the `model`, in `sampling`, in `planning`; `clock`: the engine's monotonic clock."""
    dp: tuple[Mapping[str, int], ...] = ()
    """Of every scheduler of an engine with `dp`, the counts of its own pool, sessions and turns, which `counts` has the
    sum of; none where there is one."""


def _short(value: object) -> str:
    return f"{float(f'{value:.3g}'):g}" if isinstance(value, float) else repr(value)
