"""The environment of an engine: settings that make its steps fast, unless the user said otherwise."""

from __future__ import annotations

from agentspeed_engine.serve import __main__ as start
from agentspeed_engine.serve import tuning


def test_settings_are_added_and_what_the_user_set_stays() -> None:
    assert tuning.tuned({"HOME": "/home/me"}) == {"HOME": "/home/me", **tuning.MALLOC, "GOMP_SPINCOUNT": "1000"}
    chosen = {"GOMP_SPINCOUNT": "77", "MALLOC_TOP_PAD_": "1"}
    assert tuning.tuned(chosen) == {**tuning.MALLOC, **chosen}
    assert "GOMP_SPINCOUNT" not in tuning.tuned({"OMP_WAIT_POLICY": "active"})


def test_a_tuned_environment_is_left_alone() -> None:
    once = tuning.tuned({"HOME": "/home/me"})
    assert tuning.tuned(once) == once


def test_the_switch_that_is_documented_leaves_the_environment_as_it_is() -> None:
    (name,) = {word for word in (start.__doc__ or "").split() if word.startswith("AGENTSPEED_")}
    assert tuning.tuned({name: "as it is"}) == {name: "as it is"}
