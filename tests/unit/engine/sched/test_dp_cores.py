"""The cores of several dp ranks behind the face of one: sessions are placed, branches found, numbers added up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched import dp_cores
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.dp_cores import DpCores
from agentspeed_engine.sched.plan import StepPlan, StepResult

LINK = LinkId(1)
CONFIG = CoreConfig(pages=32, context_limit=64, vocab_size=50, page_tokens=4, prefill_chunk=8, extend_tokens=4,
                    max_sessions=3, tenant_pages=20)  # fmt: skip


@pytest.fixture
def cores() -> DpCores:
    return DpCores(dp_cores.made(CONFIG, 2))


def told(cores: DpCores, command: wire.Command) -> wire.Outgoing:
    ((to, message),) = cores.handle(LINK, command, 0.0)
    assert to == LINK
    return message


def opened(cores: DpCores, tenant: str = "") -> int:
    message = told(cores, wire.Open(request=1, tenant=tenant))
    assert isinstance(message, wire.Opened)
    return message.branch


def prefills(cores: DpCores, branch: int, tokens: int = 6) -> None:
    ids = pack_ids(list(range(tokens)))
    assert isinstance(told(cores, wire.Generate(request=2, branch=branch, ids=ids, max_tokens=0)), wire.Done)


def test_sessions_are_spread_and_every_later_command_finds_its_own(cores: DpCores) -> None:
    first, second = opened(cores), opened(cores)
    assert {first % 2, second % 2} == {0, 1}
    forked = told(cores, wire.Fork(request=2, branch=second, n=2))
    assert isinstance(forked, wire.Forked) and {number % 2 for number in forked.branches} == {second % 2}
    assert isinstance(told(cores, wire.Adopt(request=3, branch=second, child=forked.branches[0])), wire.Done)
    assert isinstance(told(cores, wire.Close(request=4, branch=first)), wire.Done)
    refused = told(cores, wire.Rewind(request=5, branch=first, tokens=0))
    assert isinstance(refused, wire.Failed) and str(first) in refused.message


def test_a_branch_of_another_dp_rank_is_nobody_that_could_be_adopted(cores: DpCores) -> None:
    first, second = opened(cores), opened(cores)
    refused = told(cores, wire.Adopt(request=3, branch=first, child=second))
    assert isinstance(refused, wire.Failed) and refused.code == "branch_unknown"


def test_limits_are_those_of_each_and_the_last_of_all_refuses_by_name(cores: DpCores) -> None:
    assert len({opened(cores) for _ in range(6)}) == 6
    refused = told(cores, wire.Open(request=1))
    assert isinstance(refused, wire.Failed) and refused.code == "too_many_sessions"


def test_a_tenant_has_its_sessions_on_each_whoever_else_is_there() -> None:
    cores = DpCores(dp_cores.made(replace(CONFIG, tenant_sessions=1), 2))
    _ = opened(cores, "b")
    assert {opened(cores, "a") % 2 for _ in range(2)} == {0, 1}
    refused = told(cores, wire.Open(request=1, tenant="a"))
    assert isinstance(refused, wire.Failed) and refused.code == "quota_exceeded"


def test_a_step_of_all_has_the_rows_of_those_that_have_any_and_waits_for_its_end(cores: DpCores) -> None:
    first, second = opened(cores), opened(cores)
    assert cores.plan_together(0.0) is None
    prefills(cores, first)
    plans = cores.plan_together(0.0)
    assert plans is not None
    (mine, other) = (plans[first % 2], plans[second % 2])
    assert isinstance(mine, StepPlan) and other is None
    prefills(cores, second)
    assert cores.full and cores.plan_together(0.0) is None, "both take the next step together"
    _ = cores.apply_together([None if plan is None else StepResult(plan.seq) for plan in plans], 0.0)
    plans = cores.plan_together(0.0)
    assert plans is not None and plans[second % 2] is not None


def test_while_a_step_of_all_runs_its_end_alone_wakes_who_plans(cores: DpCores) -> None:
    first, second = opened(cores), opened(cores)
    prefills(cores, first)
    plans = cores.plan_together(0.0)
    assert plans is not None and cores.full
    assert isinstance(told(cores, wire.Expect(request=3, branch=second, seconds=1.0, keep="firm")), wire.LeaseAnswer)
    assert cores.wake_at(2.0) is None, "a lease that has ended is told of by the next plan, and none may be made"
    _ = cores.apply_together([None if plan is None else StepResult(plan.seq) for plan in plans], 2.0)
    assert cores.wake_at(2.0) == 2.0


def test_a_picture_and_counts_are_sums_beside_those_of_each(cores: DpCores) -> None:
    branches = [opened(cores, tenant) for tenant in ("a", "b", "a")]
    for branch in branches:
        prefills(cores, branch)
    while (plans := cores.plan_together(0.0)) is not None:
        _ = cores.apply_together([None if plan is None else StepResult(plan.seq) for plan in plans], 0.0)
    picture = cores.picture(wire.Look(request=1, branches=10), 0.0)
    assert [session.session for session in picture.sessions] == sorted(branches)
    assert sum(picture.pages.values()) == 64 and picture.counts["sessions"] == 3
    assert sorted(one.counts["sessions"] for one in picture.dp) == [1, 2]
    assert picture.pages["held"] == sum(one.pages["held"] for one in picture.dp) > 0
    assert picture.tenant_quota == 40 and sum(picture.tenants.values()) == picture.pages["held"]
    assert sum(one["sessions"] for one in cores.counts()) == 3
    assert cores.picture(wire.Look(request=1, branches=2), 0.0).sessions[0].branches_total == 1


def test_links_that_are_gone_close_their_sessions_everywhere(cores: DpCores) -> None:
    _ = [opened(cores) for _ in range(4)]
    assert not cores.idle
    assert cores.drop_link(LINK, 0.0) == []
    assert cores.idle
    cores.check()


def test_a_core_that_is_none_of_them_is_refused() -> None:
    with pytest.raises(EngineFault, match="no dp rank 2 of 2"):
        _ = Core(CoreConfig(pages=8, context_limit=4, vocab_size=9, page_tokens=4, dp=2, dp_index=2))
