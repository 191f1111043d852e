"""The order for one step and its result, as plain values: a worker that holds them cannot move any state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, dataclass_transform, final

from agentspeed_engine.ids import BranchId, PageId, SlotId, StepSeq, TicketId
from agentspeed_engine.kv.views import NodeRun as NodeRun
from agentspeed_engine.kv.views import PageCopy as PageCopy
from agentspeed_engine.kv.views import TurnSpec as TurnSpec

T = TypeVar("T")
DrawnEnd: TypeAlias = Literal["stop_id", "stop_string", "grammar_end"]


@dataclass_transform(frozen_default=True)
def _hot_value(kind: type[T]) -> type[T]:
    """A frozen dataclass for the type checkers, and a plain one when it runs. A step makes one of each branch, and the
    `__init__` of a frozen one takes four times as long, for it calls a function for each field."""
    return dataclass(slots=True)(kind)


@final
@dataclass(frozen=True, slots=True)
class TokenOf:
    """A token that is not known yet: the one that a step in flight samples."""

    step: StepSeq
    place: int
    """Of its row among the rows of that step that sample, in their order."""


@final
@_hot_value
class Row:
    """Consecutive tokens of one branch in one step."""

    branch: BranchId
    epoch: int
    position: int
    """Of the first id; position i's KV row is written to tail page (i - tail_start) // page_tokens."""
    ids: Sequence[int]
    path: tuple[NodeRun, ...]
    """Root first; together they hold rows [0, tail_start)."""
    tail_start: int
    tail_pages: tuple[PageId, ...]
    sample: TurnSpec | None
    """Draw one token from the logits of the last id; None for a chunk that does not end the prompt."""
    token_of: TokenOf | None = None
    """Set for a decode row that is issued before its token is known; `ids` is empty then, and the row has one token."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.ids) if self.token_of is None else 1

    @property
    def end(self) -> int:
        """The position after its last token: that of the token it samples."""
        return self.position + self.tokens


@final
@dataclass(frozen=True, slots=True)
class HostCopy:
    """One ticket: whole pages between device and host, outside any step."""

    ticket: TicketId
    direction: Literal["save", "load"]
    pages: tuple[PageId, ...]
    slots: tuple[SlotId, ...]
    begin_by: float = math.inf
    """By the engine's clock."""
    patience: float = 0.0
    """Seconds after the copier's last progress in which it may begin as well."""

    def may_begin(self, now: float, progress: float) -> bool:
        """Whether the copier may begin it at `now`; later its pages or slots may have another owner. `progress`:
        when the copier last made any."""
        return now <= max(self.begin_by, progress + self.patience)

    def progress(self, ended: float, before: float) -> float:
        """When the copier last made progress, after it ended this copy (done or failed) at `ended`; `before` is the
        time of its progress before that. A copy that took longer than another may wait to begin counts as none: the
        copies behind it have been given up meanwhile, or soon will be."""
        return ended if self.may_begin(ended, before) else before


@final
@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one step does."""

    seq: StepSeq
    rows: tuple[Row, ...]
    copies: tuple[PageCopy, ...] = ()
    ended: tuple[int, ...] = ()
    """Turns that ended since the last plan: an executor forgets their matchers and automata."""


@final
@_hot_value
class Drawn:
    """The token drawn for one row with `sample`."""

    branch: BranchId
    epoch: int
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    end: DrawnEnd | None = None
    """Set by the worker's automata: the turn ends with this token. `stop_id` only by a replay without the real ids."""
    draw_logprob: float | None = None


@final
@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of one step. Rows without `sample` are acknowledged by the step itself."""

    seq: StepSeq
    drawn: tuple[Drawn, ...] = ()
    refused: tuple[tuple[BranchId, int, str], ...] = ()
    """(branch, epoch, reason): rows whose turn cannot go on (a grammar that does not compile or dead-ends)."""
    seconds: float = 0.0
    spoilt: frozenset[tuple[BranchId, int]] = frozenset()
    """(branch, epoch) of those among `refused` whose logits are no finite numbers."""
