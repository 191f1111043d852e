"""Where a new session goes among dp ranks: by what is kept of it, by what is still to do, and never to a full rank."""

from __future__ import annotations

from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol.messages import Generate, Open
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.placing import SLACK, RankLoad, load_of, place
from agentspeed_engine.sched.plan import StepResult

LINK = LinkId(1)
ROOT = ("", "", "\0")


def load(kept: int = 0, backlog: int = 0, sessions: int = 0, limit: int = 100) -> RankLoad:
    return RankLoad(kept=kept, backlog=backlog, sessions=sessions, limit=limit)


def test_a_session_goes_where_most_of_its_prefix_is() -> None:
    assert place(100, [load(), load(kept=64), load(kept=96)]) == 2


def test_work_that_waits_outweighs_a_prefix_that_is_shorter() -> None:
    assert place(100, [load(kept=64, backlog=63), load()]) == 0
    assert place(100, [load(kept=64, backlog=65), load()]) == 1


def test_without_prefix_or_work_the_emptiest_rank_is_next_and_the_first_of_equals() -> None:
    assert place(10, [load(sessions=2), load(sessions=1), load(sessions=1)]) == 1


def test_a_prefix_that_all_share_does_not_draw_every_session_to_one_rank() -> None:
    counts = [0, 0, 0]
    for _ in range(300):
        chosen = place(100, [load(kept=96 if rank == 0 else 0, sessions=counts[rank]) for rank in range(3)])
        assert chosen is not None
        counts[chosen] += 1
    assert counts[0] <= min(counts) * 3 // 2 + SLACK + 1 and min(counts) > 0


def test_a_rank_at_its_limit_is_passed_over_and_none_is_left_when_all_are() -> None:
    assert place(10, [load(kept=8, sessions=1, limit=1), load()]) == 1
    assert place(10, [load(sessions=1, limit=1)] * 2) is None


def test_a_core_says_what_it_keeps_of_a_prompt_and_what_it_has_to_do() -> None:
    core = Core(CoreConfig(pages=32, context_limit=64, vocab_size=50, page_tokens=4, prefill_chunk=8, extend_tokens=4))
    ids = list(range(20))
    assert load_of(core.world, ROOT, pack_ids(ids)) == load(sessions=0, limit=1024)
    ((_, opened),) = core.handle(LINK, Open(request=1, ids=b""), 0.0)
    _ = core.handle(LINK, Generate(request=2, branch=opened.branch, ids=pack_ids(ids), max_tokens=0), 0.0)
    assert load_of(core.world, ROOT, pack_ids(ids)).backlog == 20
    while (step := core.plan(0.0)) is not None:
        _ = core.apply(StepResult(step.seq), 0.0)
    before = core.key()
    found = load_of(core.world, ROOT, pack_ids([*ids[:18], 40, 41]))
    assert (found.kept, found.backlog, found.sessions) == (16, 0, 1), "whole pages count"
    assert load_of(core.world, ROOT, pack_ids([9, *ids])).kept == 0
    assert core.key() == before, "the core was only looked at"
