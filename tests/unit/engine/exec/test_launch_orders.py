"""What rank 0 tells of a step that every rank launches by itself, and when a step counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from agentspeed_engine.exec.cuda import Enqueued
from agentspeed_engine.exec.device_steps import LogitRules
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.ranks.group import GroupBroken
from agentspeed_engine.exec.ranks.launches import HeardOrders, LaunchOrder, LaunchOrders, arrive
from agentspeed_engine.exec.step_input import Sample, StepInput, Unknown
from agentspeed_engine.ids import BranchId, PageId
from agentspeed_engine.kv.views import PageCopy, TurnSpec
from agentspeed_engine.protocol.messages import Sampling
from tests.support.paged import Trail, batch

VOCABULARY = 40
PAST, LATER = -math.inf, math.inf


def turn(number: int, **asked: Any) -> TurnSpec:
    return TurnSpec(turn=number, branch=BranchId(number), sampling=Sampling(**asked), draw_key=(5, number, 0),
                    stop_strings=(), grammar=None, consumed_ids=(), prompt_tokens=1)  # fmt: skip


def step_of(number: int, turns: list[TurnSpec], position: int) -> StepInput:
    every = np.arange(len(turns), dtype=np.int64)
    return StepInput(
        step=number,
        batch=batch(16, [(Trail(16, [row], known=position), [7]) for row in range(max(1, len(turns)))]),
        unknown=Unknown(at=every, step=every * 0 + number - 1, place=every[::-1].copy()),
        copies=(PageCopy(PageId(3), PageId(4), 5),),
        samples=tuple(Sample(one, position + 1) for one in turns),
    )


def told(order: LaunchOrder) -> LaunchOrder:
    """As it comes out of a socket."""
    return msgspec.msgpack.Decoder(LaunchOrder).decode(msgspec.msgpack.encode(order))


def test_a_rank_hears_every_step_as_rank_0_has_it_whoever_drew_before() -> None:
    orders, heard = LaunchOrders(), HeardOrders(VOCABULARY)
    one, other = turn(1, temperature=0.7, top_k=5), turn(2, logprobs=3)
    allowed = np.arange(VOCABULARY) % 3 == 0
    changed = Adjustment(np.array([4, 9]), np.ones(2, np.float32), np.full(2, -1.5, np.float32))
    plain = LogitRules()
    steps = [
        (step_of(1, [one, other], 4), plain), (step_of(2, [one, other], 5), plain),
        (step_of(3, [other, one], 6), LogitRules({0: allowed}, {1: changed})), (step_of(4, [other, one], 7), plain),
        (step_of(5, [], 8), plain), (step_of(6, [other], 8), plain),
    ]  # fmt: skip
    repeated = []
    for given, rules in steps:
        order = told(orders.of(given, rules))
        repeated.append(order.again)
        step, asked = heard.step(order)
        assert step.step == given.step and step.copies == given.copies
        assert step.batch.ids.tolist() == given.batch.ids.tolist()
        assert [part.tolist() for part in (step.unknown.at, step.unknown.step, step.unknown.place)] == [
            part.tolist() for part in (given.unknown.at, given.unknown.step, given.unknown.place)
        ]
        assert [(s.position, s.spec.sampling, s.spec.draw_key) for s in step.samples] == [
            (s.position, s.spec.sampling, s.spec.draw_key) for s in given.samples
        ]
        assert {place: mask.tolist() for place, mask in asked.masks.items()} == {
            place: mask.tolist() for place, mask in rules.masks.items()
        }
        for place, adjustment in rules.adjustments.items():
            theirs = asked.adjustments[place]
            assert (theirs.ids.tolist(), theirs.shift.tolist()) == (adjustment.ids.tolist(), adjustment.shift.tolist())
    assert repeated == [False, True, False, True, False, False], "what turns ask for is told once"


def test_turns_that_go_on_are_the_same_objects_so_that_nothing_of_them_is_copied_again() -> None:
    orders, heard = LaunchOrders(), HeardOrders(VOCABULARY)
    turns = [turn(1), turn(2)]
    first, _ = heard.step(told(orders.of(step_of(1, turns, 4), LogitRules())))
    second, _ = heard.step(told(orders.of(step_of(2, turns, 5), LogitRules())))
    assert all(a.spec is b.spec for a, b in zip(first.samples, second.samples, strict=True))


@dataclass
class Event:
    looks: int
    """Until it has passed."""

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


class PeersGroup:
    """A group whose sums end when it is abandoned, or, with `deaf`, do not."""

    def __init__(self, late: int | None, deaf: bool = False) -> None:
        self.late, self.given_up, self._deaf = late, False, deaf
        self.event: Event | None = None

    def abandon(self) -> None:
        if not self._deaf:
            self.given_up = True
            if self.event is not None:
                self.event.looks = 0


def test_a_step_that_has_passed_counts_unless_somebody_was_given_up_in_it() -> None:
    group: Any = PeersGroup(late=None)
    arrive(Event(3), group, LATER)
    group.abandon()
    with pytest.raises(GroupBroken, match="a rank gave up") as broken:
        arrive(Event(0), group, LATER)
    assert broken.value.late is None, "why, whoever gave up knows"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_step_that_does_not_end_gives_up_the_rank_that_did_not_come(deaf: bool) -> None:
    group: Any = PeersGroup(late=1, deaf=deaf)
    group.event = Event(1 << 60)
    with pytest.raises(GroupBroken, match="did not end in time") as broken:
        arrive(group.event, group, PAST)
    assert broken.value.late == 1


@pytest.mark.parametrize(("until", "why"), [(PAST, "did not end in time"), (LATER, "a rank gave up")])
def test_a_step_that_does_not_end_though_its_ranks_are_given_up_is_waited_for_no_longer(until: float, why: str) -> None:
    """As one that sums over NCCL, whose kernels hear of no end."""
    group: Any = PeersGroup(late=1)
    if until == LATER:
        group.abandon()
    with pytest.raises(GroupBroken, match=why) as broken:
        arrive(Event(1 << 60), group, until, ending=0.0)
    assert broken.value.late is None, "a GPU that does not end cannot be asked"


@pytest.mark.parametrize(("looks", "until", "done"), [(0, LATER, True), (1 << 60, LATER, False), (1 << 60, PAST, True)])
def test_a_step_that_is_overdue_is_collected_though_it_has_not_passed(looks: int, until: float, done: bool) -> None:
    """Else the last one before a pause would be looked at for ever."""
    none = torch.zeros(0)
    assert Enqueued(1, Event(looks), (), {}, until, none, none, none, none, none, none).done() == done
