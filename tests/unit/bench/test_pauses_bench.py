"""The comparison of policies under pauses is fair and judged as it says."""

from __future__ import annotations

import math

import pytest

from bench.pauses import judge
from bench.pauses_run import Counted, Load, Run
from bench.pauses_workload import TRACE, Agent, pause_at, read_trace, shape_of

SHAPE = shape_of(read_trace(TRACE))


def counted(prefilled: int, jobs: int) -> Counted:
    return Counted(prefilled=prefilled, needed=100, jobs=jobs)


def small(policy: str, pressure: float) -> Counted:
    load = Load(trace=SHAPE, agents=8, pressure=pressure, host=False, seed=3, scale=64, warm=60.0, seconds=200.0)
    return Run(load, policy).result()


def test_pauses_follow_the_published_quantiles_and_end_at_their_cap() -> None:
    for share, seconds in ((0.5, 0.3), (0.9, 13.6), (0.99, 216.0), (1.0, 600.0)):
        assert math.isclose(pause_at(share), seconds, rel_tol=1e-6)


def test_an_agent_does_the_same_whatever_the_engine_makes_of_it() -> None:
    first, second = (Agent(SHAPE, 32, 5, 1) for _ in range(2))
    for _ in range(50):
        turn = first.turn()
        assert turn == second.turn()
        assert first.ids(turn.append) == second.ids(turn.append)


def test_with_room_for_all_every_token_is_computed_once() -> None:
    assert small("next_use", 0.5).amplification == small("lru", 0.5).amplification == 1.0


def test_a_run_under_pressure_computes_again_and_comes_out_the_same_twice() -> None:
    one = small("next_use", 3.0)
    assert one.amplification > 1.0 and one == small("next_use", 3.0)


def test_rows_pinned_for_ever_wedge_a_pool_that_is_too_small() -> None:
    assert small("pin", 3.0).wedged and not small("next_use", 3.0).wedged


def test_a_rival_counts_only_if_it_does_the_jobs() -> None:
    figures = {
        "next_use": [counted(300, 100)],
        "lru": [counted(200, 97)],
        "ttl": [counted(310, 100)],
        "oracle": [counted(250, 100)],
    }
    verdict = judge(figures)
    assert verdict.rival == "ttl" and verdict.loss_pct < 0 and math.isclose(verdict.oracle_gap_pct, 20.0)
    assert judge(figures | {"lru": [counted(200, 98)]}).loss_pct == 50.0


def test_the_error_of_a_loss_is_what_the_seeds_disagree_by() -> None:
    def against(*rival: int) -> float:
        ours = [counted(200, 10)] * len(rival)
        return judge(
            {"next_use": ours, "lru": [counted(tokens, 10) for tokens in rival], "oracle": ours}
        ).loss_error_pct

    assert against(100, 100, 100) == against(100) == 0.0
    assert against(100, 110, 90) > against(100, 101, 99) > 0.0


def test_a_comparison_without_the_oracle_is_refused() -> None:
    with pytest.raises(ValueError, match="needs next_use and oracle"):
        _ = judge({"next_use": [counted(1, 1)]})
