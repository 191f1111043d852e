"""What ranks draw from their pieces of the vocabulary is what one process draws from the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.ranks import shard_draw
from agentspeed_engine.exec.ranks.orders import sample_order, shard_sample
from agentspeed_engine.exec.ranks.shard_draw import draw_shards
from agentspeed_engine.exec.sampler import Draw, draw
from agentspeed_engine.protocol.messages import Sampling

VOCABULARY = 48


def drawn_by(
    ranks: int,
    logits: NDArray[Any],
    samplings: Sequence[Sampling],
    allowed: NDArray[np.bool_] | None,
    adjustment: Adjustment | None = None,
) -> list[list[Draw | EngineFault]]:
    """What every rank comes to, from its own piece and what all told."""
    share = logits.shape[1] // ranks
    orders = [sample_order(one, (7, index, 0), 40 + index, allowed, adjustment) for index, one in enumerate(samplings)]
    running = [
        draw_shards(
            logits[:, rank * share : (rank + 1) * share],
            rank * share,
            [shard_sample(one, rank * share, share) for one in orders],
        )
        for rank in range(ranks)
    ]
    told = [next(rounds) for rounds in running]
    while True:
        heard, told, came = np.stack(told), [], []
        for rounds in running:
            try:
                told.append(rounds.send(heard))
            except StopIteration as end:
                came.append(end.value)
        if came:
            assert len(came) == ranks, "all ranks end in the same round"
            return came


def alone(
    row: NDArray[Any],
    index: int,
    sampling: Sampling,
    allowed: NDArray[np.bool_] | None,
    adjustment: Adjustment | None,
) -> Draw | EngineFault:
    try:
        return draw(row, sampling, (7, index, 0), 40 + index, allowed, adjustment)
    except EngineFault as fault:
        return fault


def assert_same(got: Draw | EngineFault, wanted: Draw | EngineFault) -> None:
    if isinstance(wanted, EngineFault):
        assert isinstance(got, EngineFault) and str(got) == str(wanted)
        return
    assert isinstance(got, Draw)
    assert got.id == wanted.id
    assert got.logprob == pytest.approx(wanted.logprob, abs=1e-12)
    assert got.draw_logprob == pytest.approx(wanted.draw_logprob, abs=1e-12)
    assert [number for number, _ in got.top] == [number for number, _ in wanted.top]
    assert [one for _, one in got.top] == pytest.approx([one for _, one in wanted.top], abs=1e-12)


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, VOCABULARY + 5),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    logprobs=st.none() | st.integers(0, 20),
)


@pytest.fixture(params=[2, 256], ids=["edges by digits", "edges among the highest"])
def highest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_draw, "HIGHEST", request.param)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.usefixtures("highest")
def test_ranks_draw_what_one_process_draws(data: st.DataObject) -> None:
    """Also with penalties, ties across ranks, masked and impossible ids, and pieces in which nothing is left."""
    samplings = data.draw(st.lists(SAMPLINGS, max_size=4))
    ranks = data.draw(st.sampled_from([1, 2, 3, 4]))
    noise = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = noise.normal(scale=data.draw(st.sampled_from([0.1, 3.0, 40.0])), size=(len(samplings), VOCABULARY))
    if data.draw(st.booleans()):
        logits = np.round(logits)  # ties
    logits = logits.astype(data.draw(st.sampled_from([np.float32, np.float64])))
    logits[:, noise.random(VOCABULARY) < data.draw(st.sampled_from([0.0, 0.3, 0.99]))] = -np.inf
    allowed = noise.random(VOCABULARY) < 0.4 if data.draw(st.booleans()) else None
    if allowed is not None:
        allowed[noise.integers(VOCABULARY)] = True
    adjustment: Adjustment | None = None
    if data.draw(st.booleans()):
        ids = np.flatnonzero(noise.random(VOCABULARY) < 0.3)
        scale, shift = noise.uniform(0.5, 2.0, len(ids)), noise.normal(scale=3.0, size=len(ids))
        adjustment = Adjustment(ids, scale.astype(np.float32), shift.astype(np.float32))
    wanted = [
        alone(row, index, one, allowed, adjustment)
        for index, (row, one) in enumerate(zip(logits, samplings, strict=True))
    ]
    for came in drawn_by(ranks, logits, samplings, allowed, adjustment):
        for got, want in zip(came, wanted, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_nothing_can_be_drawn_from_are_refused_on_every_rank(broken: float) -> None:
    logits = np.zeros((2, VOCABULARY))
    logits[0, 30] = broken
    if broken == -np.inf:
        logits[0] = broken
    for came in drawn_by(4, logits, [Sampling(temperature=1.0, top_p=0.9)] * 2, None):
        assert isinstance(came[0], EngineFault) and came[0].code == "bad_weights"
        assert isinstance(came[1], Draw)
