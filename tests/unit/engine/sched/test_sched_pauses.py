"""The law of pauses must choose MRU for regular pauses and LRU for heavy-tailed ones, by itself."""

from __future__ import annotations

import random

from agentspeed_engine.sched.pause_model import PauseModel


def test_regular_pauses_make_the_branch_that_rested_last_the_furthest() -> None:
    law = PauseModel()
    for _ in range(16):
        law.observe(16.0)
    residuals = [law.residual(elapsed) for elapsed in (0.1, 4.0, 8.0, 12.0, 15.0)]
    assert residuals == sorted(residuals, reverse=True)


def test_heavy_tailed_pauses_make_the_branch_that_rested_longest_the_furthest() -> None:
    law = PauseModel()
    draw = random.Random(7)
    for _ in range(800):
        law.observe(0.3 * 45.0 ** (draw.gauss(0.0, 1.0)))
    residuals = [law.residual(elapsed) for elapsed in (0.1, 1.0, 10.0, 100.0)]
    assert residuals == sorted(residuals)


def test_one_observation_is_enough_to_see_a_rhythm() -> None:
    law = PauseModel()
    law.observe(16.0)
    assert law.residual(1.0) > law.residual(12.0)


def test_a_branch_a_little_late_is_due_and_a_branch_very_late_is_far_away() -> None:
    law = PauseModel()
    for _ in range(32):
        law.observe(10.0)
    assert law.residual(10.5) < law.residual(2.0)
    assert law.residual(200.0) > 100.0


def test_before_anything_was_seen_the_longest_silence_is_the_furthest_next_use() -> None:
    law = PauseModel()
    assert law.quantile(0.5) is None
    assert law.residual(1.0) < law.residual(10.0)


def test_quantiles_follow_what_was_observed() -> None:
    law = PauseModel()
    for seconds in (1.0,) * 90 + (100.0,) * 10:
        law.observe(seconds)
    median, late = law.quantile(0.5), law.quantile(0.95)
    assert median is not None and 0.7 < median < 1.4
    assert late is not None and 70 < late < 140


def test_a_snapshot_restores_the_same_law() -> None:
    law = PauseModel()
    for seconds in (0.2, 3.0, 40.0):
        law.observe(seconds)
    again = PauseModel.restored(law.snapshot())
    assert again.residual(2.0) == law.residual(2.0)
    assert again.observations == law.observations


def test_a_changed_workload_is_learnt_anew() -> None:
    law = PauseModel()
    for _ in range(3000):
        law.observe(1000.0)
    for _ in range(3000):
        law.observe(0.1)
    late = law.quantile(0.8)
    assert late is not None and late < 1.0
