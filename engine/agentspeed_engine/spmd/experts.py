"""Which group of ranks holds which experts, spare copies among them, and how many ranks a row goes to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, final

Exchange = Literal["sum", "all_to_all"]
"""`sum`: every rank is given all rows and adds what its own experts give. `all_to_all`: a row goes to the ranks of the
experts that it chose, and their results come back."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpread:
    """How the routed experts of a model lie on a mesh."""

    groups: int | None = None
    """Groups of ranks that have experts of their own (ep); the ranks of a group cut each of its experts by the inner
    width. None: every rank is a group."""
    spare: int = 0
    """Further copies of experts, for those with the most load. A row takes one copy, in turn."""
    exchange: Exchange = "sum"
    loads: tuple[float, ...] = ()
    """How often each expert is chosen, in any unit; empty: all alike."""

    def __post_init__(self) -> None:
        if self.spare < 0 or (self.groups is not None and self.groups < 1):
            raise ValueError(f"groups of experts are at least one and spare copies none, not {self}")


@lru_cache(maxsize=8)
def deal(experts: int, groups: int, spare: int = 0, loads: tuple[float, ...] = ()) -> tuple[tuple[int, ...], ...]:
    """The experts of every group, (experts + spare) / groups each: consecutive ones, or where there are spare copies
    or loads, dealt so that the groups' loads are near each other.

    Every spare copy goes to the expert with the most load a copy; no expert has more copies than there are groups.
    """
    each = (experts + spare) // groups
    if not spare and not loads:
        return tuple(tuple(range(group * each, (group + 1) * each)) for group in range(groups))
    weights = loads or (1.0,) * experts
    copies = [1] * experts
    for _ in range(spare):
        open_to_more = [expert for expert in range(experts) if copies[expert] < groups]
        copies[max(open_to_more, key=lambda expert: (weights[expert] / copies[expert], -expert))] += 1
    shares = sorted(
        (-weights[expert] / copies[expert], expert) for expert in range(experts) for _ in range(copies[expert])
    )
    held: list[list[int]] = [[] for _ in range(groups)]
    carried = [0.0] * groups
    for share, expert in shares:
        room = [group for group in range(groups) if len(held[group]) < each]
        lightest = min(room, key=lambda group: (expert in held[group], carried[group], len(held[group]), group))
        held[lightest].append(expert)
        carried[lightest] -= share
    return tuple(tuple(sorted(own)) for own in held)


def copies_of(dealt: Sequence[Sequence[int]], experts: int) -> list[list[int]]:
    """The places of every expert's copies; place i of group g is g * (places of a group) + i."""
    found: list[list[int]] = [[] for _ in range(experts)]
    place = 0
    for own in dealt:
        for expert in own:
            found[expert].append(place)
            place += 1
    return found


def share_of_rows(experts: int, top: int, groups: int) -> float:
    """The part of all rows that chose at least one expert of a given group, were every choice of `top` experts alike
    likely: one less the chance to draw `top` times beside the group's own, without putting back."""
    own, missed = experts / groups, 1.0
    for drawn in range(top):
        missed *= max(0.0, experts - own - drawn) / (experts - drawn)
    return 1.0 - missed
