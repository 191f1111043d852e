"""Which rows go first when a running turn needs pages: pure functions over measured costs, one per policy.

A policy turns what is known of a victim into a number; the largest goes first, None never goes. Ours is "furthest next
use". The others exist to be compared with it (`bench/retention.py`, `bench/pauses.py`); `pin` can wedge the pool by
design, which is what it is there to show.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias


class Facts(NamedTuple):
    """What is known of the branches that would lose rows."""

    tokens: int
    """Rows that go."""
    rested: float
    """Seconds since one of them last computed."""
    expected: float
    """Seconds until the first of them is expected to run again: a hint, else the learnt law of pauses."""
    copy_seconds: float
    """Per token, to the host or back."""
    recompute_seconds: float
    """Per token."""
    oracle: float | None = None
    """The true seconds until next use; None in an engine. Offline runs know them."""
    waiting: int | None = None
    """The age of the oldest turn that waits for room and has some of these rows (then `expected` is 0); None: all of
    the branches are paused."""


Policy: TypeAlias = Callable[[Facts], float | None]

TTL_SECONDS: Final = 60.0
_BEFORE_ANY_PAUSE_ENDS: Final = -1e12


def needed_in(expected: float, waiting: int | None) -> float:
    """Ours: who is needed last goes first. Turns that wait come before branches that pause, and among themselves enter
    in the order of their age, so the youngest is needed last. `expected` and `waiting` are those of `Facts`, which the
    scheduler does not make for this alone: it ranks all that rests with it."""
    return expected if waiting is None else _BEFORE_ANY_PAUSE_ENDS + waiting


def next_use(facts: Facts) -> float | None:
    """`needed_in`."""
    return needed_in(facts.expected, facts.waiting)


def lru(facts: Facts) -> float | None:
    """The branch that computed longest ago goes first, whether it pauses or waits for its turn."""
    return facts.rested


def ttl(facts: Facts) -> float | None:
    """Least recently used, but for pauses within their time to live: those go only when nothing else can, not even
    rows of turns that wait, so that no turn starves."""
    within = facts.waiting is None and facts.rested <= TTL_SECONDS
    return facts.rested - 1e9 if within else facts.rested


def pin(facts: Facts) -> float | None:
    """Never evicts the rows of a session that is open."""
    return None


def min_waste(facts: Facts) -> float | None:
    """Memory held for nothing (tokens x pause) against what it costs to have the rows again, the cheaper way back."""
    back = facts.recompute_seconds
    if facts.copy_seconds:
        back = min(back, 2 * facts.copy_seconds)
    return facts.tokens * facts.expected - facts.tokens * facts.tokens * back


def oracle(facts: Facts) -> float | None:
    """Belady's choice; without knowledge of the future it is ours."""
    return next_use(facts) if facts.oracle is None or facts.waiting is not None else facts.oracle


POLICIES: Final = MappingProxyType[str, Policy](
    {
        "next_use": next_use,
        "lru": lru,
        "ttl": ttl,
        "pin": pin,
        "min_waste": min_waste,
        "oracle": oracle,
    }
)


def worth_saving(copy_seconds: float, recompute_seconds: float) -> bool:
    """A copy out and back costs less than computing the rows again. Unmeasured costs count as equal to nothing."""
    return 2 * copy_seconds <= recompute_seconds or recompute_seconds == 0.0
