"""Trajectories as values: what is equal compares equal, also where there is no log-probability."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest

from agentspeed import Session
from agentspeed.errors import InvalidRequest
from agentspeed.testing import ScriptedEngine
from agentspeed.trajectory import Trajectory

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def said(session: Session) -> Trajectory:
    _ = await session.generate("Hi")
    return session.trajectory()


async def test_trajectories_of_the_same_tokens_are_equal_and_one_in_a_set() -> None:
    async with ScriptedEngine(["Fine.", "Fine."]) as engine:
        async with engine.session(record_logprobs=True) as s:
            one = await said(s)
        async with engine.session(record_logprobs=True) as s:
            other = await said(s)
    assert any(math.isnan(value) for value in one.logprobs)
    assert one == other
    assert len({one, other, copy.deepcopy(one), pickle.loads(pickle.dumps(one))}) == 1


def test_trajectories_that_differ_anywhere_are_unequal() -> None:
    path = Trajectory(ids=(1, 2), made=(False, True), logprobs=(math.nan, -0.5), draw_logprobs=(math.nan, -0.125))
    for other in (
        replace(path, ids=(1, 3)),
        replace(path, made=(True, True)),
        replace(path, logprobs=(math.nan, -0.25)),
        replace(path, logprobs=(0.0, -0.5)),
        replace(path, logprobs=(math.nan, math.nan)),
        replace(path, draw_logprobs=(math.nan, 0.0)),
        Trajectory(ids=(1,), made=(False,), logprobs=(math.nan,), draw_logprobs=(math.nan,)),
    ):
        assert path != other
    assert path != (path.ids, path.made, path.logprobs)


async def test_a_trajectory_is_strict_json_and_comes_back_the_same() -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session(record_logprobs=True) as s:
        one = await said(s)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    found = json.loads(one.to_json(), parse_constant=refuse)
    assert found["ids"] == list(one.ids)
    for name, values in (("logprobs", one.logprobs), ("draw_logprobs", one.draw_logprobs)):
        assert [value is None for value in found[name]] == [math.isnan(value) for value in values]
        assert [not made for made in one.made] == [math.isnan(value) for value in values]
    assert Trajectory.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"ids":[1],"made":[true],"logprobs":[],"draw_logprobs":[0]}',
        '{"ids":[1],"made":[true],"logprobs":[0],"draw_logprobs":[]}',
        '{"ids":[1]}',
    ],
)
def test_what_is_no_trajectory_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="no trajectory"):
        _ = Trajectory.from_json(text)
