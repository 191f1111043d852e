"""The seam between deciding and computing: an executor turns step inputs into sampled tokens.

`exec.cpu.CpuExecutor` is the first one. An executor on an accelerator enqueues in `launch` and waits in `collect`; one
that leads a group of ranks broadcasts each order as it is (`exec.step_input.Order`) and carries out its own share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, final

from agentspeed_engine.exec.step_input import StepInput
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.sched.plan import DrawnEnd


@final
@dataclass(frozen=True, slots=True)
class Token:
    """What one sample came to."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability in the softmax of the raw logits; None unless the turn asked for any."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, logprob) of the likeliest, best first: as many as the turn asked for."""
    end: DrawnEnd | None = None
    """Why the turn ends with this token, if one of the turn's automata says so."""
    draw_logprob: float | None = None
    """Natural logarithm of its probability in the distribution that it was drawn from: after penalties, bias, grammar,
    temperature, top_k, top_p and min_p; 0 of a greedy turn. None where `logprob` is."""


@final
@dataclass(frozen=True, slots=True)
class Refusal:
    """A sample that cannot be drawn: its turn ends with this reason, and the others of the step are not concerned."""

    reason: str
    spoilt: bool = False
    """The logits are no finite numbers: rows that its turn read may be at fault."""


Sampled: TypeAlias = tuple[Token | Refusal, ...]
"""One for each sample of the step, in its order."""


class Pending(Protocol):
    """A step that was launched and not collected yet."""

    @property
    def step(self) -> int:
        """Its number."""
        ...

    def done(self) -> bool:
        """Whether `collect` would return without waiting. It never blocks."""
        ...


class Executor(Protocol):
    """Carries out steps. One thread calls `launch` and `collect`; another one may call the rest at the same time."""

    @property
    def page_tokens(self) -> int:
        """Rows of a page."""
        ...

    @property
    def model_seconds(self) -> float:
        """Time spent in forward passes since the start."""
        ...

    @property
    def sampling_seconds(self) -> float:
        """Time spent in sampling since the start."""
        ...

    def launch(self, step: StepInput) -> Pending:
        """Begins one step. Steps are launched in the order of their numbers, and before an earlier one is collected
        when the scheduler plans ahead; a step may then name tokens of steps that were in flight when it was planned
        (`StepInput.unknown`). The values of `step` stay as they are until it is collected.

        It may return before anything is computed. What it raises is a bug, and ends the engine."""
        ...

    def collect(self, pending: Pending) -> Sampled:
        """Waits for the oldest step that was launched and not collected, and returns what it sampled.

        When it returns, the rows of the step are in the pool and the step reads no page any more, so the scheduler may
        give its pages to others. Logits stay inside: of a distribution only the log-probabilities leave that a turn
        asked for. What it raises is a bug, and ends the engine; what one turn cannot do is a `Refusal`."""
        ...

    def prepare(self, spec: TurnSpec) -> str | None:
        """Makes ready what sampling this turn needs and takes long (its grammar, the vocabulary's bytes), in the
        calling thread. Returns why the turn cannot be served, or None. A turn that was not prepared is prepared by the
        step that samples it first, which then takes longer.

        What is kept for the turn goes when a step says that the turn has ended, or with `discard`."""
        ...

    def discard(self, turn: int) -> None:
        """A turn that was prepared will never be sampled: what is kept for it goes."""
        ...

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copies device pages to host slots on every rank, and returns when the rows have arrived. The scheduler
        orders it only of pages that no unacknowledged step writes. Raises `CopyFailed`."""
        ...

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Copies host slots to device pages on every rank, and returns when the rows have arrived. No unacknowledged
        step reads these pages. Raises `CopyFailed`."""
        ...


class CopyFailed(Exception):
    """A host copy did not happen; the engine goes on without it."""
