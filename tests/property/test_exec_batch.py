"""Over random sessions every query of every step sees each token of its own log exactly once, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentspeed_engine.exec.batch import Batcher
from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.exec.worker import Worker
from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol.messages import (
    Adopt,
    Cancel,
    Close,
    Command,
    Failed,
    Fork,
    Forked,
    Generate,
    Open,
    Opened,
    Outgoing,
    Rewind,
    Tokens,
    TurnEnded,
)
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import StepPlan, StepResult
from tests.support.remembering_model import RememberingModel, continuation

LINK = LinkId(1)
VOCABULARY, PAGE = 50, 4


class World:
    """A core and a worker driven by hand, with every branch's log mirrored as a front does."""

    def __init__(self, pages: int, context: int, depth: int = 0, ahead: bool = False) -> None:
        self.core = Core(
            CoreConfig(
                pages=pages,
                context_limit=context,
                vocab_size=VOCABULARY,
                page_tokens=PAGE,
                prefill_chunk=11,
                extend_tokens=5,
                depth=depth,
                decode_ahead=ahead,
                firm_pages=0,
            )
        )
        self.model = RememberingModel(pages, PAGE, VOCABULARY)
        self.worker = Worker(CpuExecutor(self.model, Vocabulary(Path("none"), VOCABULARY, ()), depth=depth))
        self.logs: dict[int, list[int]] = {}
        self.asked: dict[int, list[int]] = {}
        """Log at the time of `generate` of branches whose turn runs."""
        self.flights: list[StepResult] = []

    def tell(self, command: Command) -> Outgoing | None:
        """The reply, if it came at once."""
        replies = self.read(self.core.handle(LINK, command, 0.0))
        return replies[0] if replies else None

    def read(self, out: list[tuple[LinkId, Outgoing]]) -> list[Outgoing]:
        replies: list[Outgoing] = []
        for _, message in out:
            match message:
                case Tokens():
                    self.logs[message.branch] += unpack_ids(message.ids)
                case TurnEnded():
                    known = self.logs.get(message.branch)
                    if known is not None:
                        del known[message.known :]
                        self._follows(message.branch)
                    self.asked.pop(message.branch, None)
                case _ if hasattr(message, "request"):
                    replies.append(message)
                case _:
                    pass
        self.core.check()
        return replies

    def _follows(self, branch: int) -> None:
        """What a turn drew is what an undisturbed session would have drawn."""
        start, log = self.asked[branch], self.logs[branch]
        assert log[len(start) :] == continuation(start, len(log) - len(start), VOCABULARY)

    def step(self) -> bool:
        """Plans and computes; results wait in `flights` as long as the depth allows. False when nothing was left."""
        plan = self.core.plan(0.0)
        self.read(self.core.events())
        if plan is not None:
            self.flights.append(self.worker.execute(plan))
            self._saw(plan)
            return True
        if self.flights:
            self.read(self.core.apply(self.flights.pop(0), 0.0))
            return True
        return False

    def _saw(self, plan: StepPlan) -> None:
        seen = iter(self.model.seen)
        for row in plan.rows:
            known = next(seen)
            for _ in range(1, row.tokens):
                known = next(seen)
            log = self.logs.get(row.branch)
            if log is not None:
                assert known[: len(log)] == log[: len(known)], "a row of another branch was seen"

    def idle(self) -> list[int]:
        return [branch for branch in self.logs if branch not in self.asked]


def act(world: World, draw: Random, request: int) -> None:
    """One random command of a front."""
    idle = world.idle()
    verb = draw.choice(["open", "generate", "generate", "fork", "rewind", "cancel", "live fork", "adopt", "close"])
    ids = [draw.randrange(3) for _ in range(draw.randrange(1, 14))]
    if verb == "open" or not world.logs:
        reply = world.tell(Open(request=request, ids=pack_ids(ids)))
        assert isinstance(reply, Opened)
        world.logs[reply.branch] = ids
    elif verb == "generate" and idle:
        branch = draw.choice(idle)
        world.logs[branch] = world.logs[branch] + ids
        world.asked[branch] = list(world.logs[branch])
        reply = world.tell(Generate(request=request, branch=branch, ids=pack_ids(ids), max_tokens=draw.randrange(9)))
        if isinstance(reply, Failed):
            assert reply.code == "context_overflow"
            del world.logs[branch][-len(ids) :]
            world.asked.pop(branch, None)
    elif verb == "fork" and idle:
        branch = draw.choice(idle)
        fork(world, branch, request, at=draw.choice([None, draw.randrange(len(world.logs[branch]) + 1)]))
    elif verb == "rewind" and idle:
        branch = draw.choice(idle)
        cut = draw.randrange(len(world.logs[branch]) + 1)
        world.tell(Rewind(request=request, branch=branch, tokens=cut))
        world.logs[branch] = world.logs[branch][:cut]
    elif verb == "cancel" and world.asked:
        world.tell(Cancel(request=request, branch=draw.choice(list(world.asked))))
    elif verb == "live fork" and world.asked:
        fork(world, draw.choice(list(world.asked)), request)
    elif verb == "adopt" and len(idle) > 1:
        trunk, child = draw.sample(idle, 2)
        reply = world.tell(Adopt(request=request, branch=trunk, child=child))
        if not isinstance(reply, Failed):
            world.logs[trunk] = world.logs.pop(child)
    elif verb == "close" and len(world.logs) > 3:
        branch = draw.choice(list(world.logs))
        world.logs.pop(branch)
        world.asked.pop(branch, None)
        world.tell(Close(request=request, branch=branch))


def fork(world: World, branch: int, request: int, at: int | None = None) -> None:
    """The children's logs are their parent's up to what is committed when they are born."""
    reply = world.tell(Fork(request=request, branch=branch, n=2, at=at))
    while reply is None:  # the parent's rows are in flight
        out = world.core.apply(world.flights.pop(0), 0.0)
        replies = [message for message in world.read(out) if getattr(message, "request", None) == request]
        reply = replies[0] if replies else None
    if isinstance(reply, Forked):
        for child in reply.branches:
            world.logs[child] = world.logs[branch][: reply.known]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    pages=st.sampled_from([16, 24, 60]),
    depth=st.sampled_from([0, 0, 1, 2]),
    ahead=st.booleans(),
)
def test_every_query_sees_exactly_its_own_log(seed: int, pages: int, depth: int, ahead: bool) -> None:
    draw = Random(seed)
    world = World(pages, context=56, depth=depth, ahead=ahead and depth > 0)
    for request in range(60):
        act(world, draw, request)
        for _ in range(draw.randrange(4)):
            if not world.step():
                break
    for _ in range(3000):
        if not world.step():
            break
    assert not world.asked, "every turn ended"


def plans() -> Iterator[StepPlan]:
    world = World(64, context=56)
    opened = world.tell(Open(request=1, ids=pack_ids([1] * 21)))
    assert isinstance(opened, Opened)
    world.logs[opened.branch] = [1] * 21
    world.asked[opened.branch] = [1] * 21
    world.tell(Generate(request=2, branch=opened.branch, max_tokens=0))
    while world.step():
        pass
    forked = world.tell(Fork(request=3, branch=opened.branch, n=3))
    assert isinstance(forked, Forked)
    for child in forked.branches:
        world.tell(Generate(request=4, branch=child, ids=pack_ids([child]), max_tokens=3))
    while (plan := world.core.plan(0.0)) is not None:
        yield plan
        world.core.apply(world.worker.execute(plan), 0.0)


def test_a_shared_prefix_is_one_run_with_the_queries_of_all_branches() -> None:
    batcher = Batcher(PAGE)
    batches = [batcher.step_input(plan).batch for plan in plans()]
    shared = [run for run in batches[-1].runs if not run.causal]
    assert [len(run.queries) for run in shared] == [3]
    assert shared[0].tokens == 20


def test_page_arrays_are_made_once_per_node_run() -> None:
    batcher = Batcher(PAGE)
    batches = [batcher.step_input(plan).batch for plan in plans()]
    pages = [run.pages for batch in batches for run in batch.runs if not run.causal and run.tokens == 20]
    assert len(pages) > 1
    assert all(array is pages[0] for array in pages)


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_a_tail_names_only_the_pages_it_has_reached(tokens: int) -> None:
    world = World(64, context=56)
    opened = world.tell(Open(request=1, ids=pack_ids([2] * tokens)))
    assert isinstance(opened, Opened)
    world.tell(Generate(request=2, branch=opened.branch, max_tokens=1))
    plan = world.core.plan(0.0)
    assert plan is not None
    (tail,) = Batcher(PAGE).step_input(plan).batch.runs
    assert len(tail.pages) == -(-tokens // PAGE)
