"""Draws: exact greedy, noise that depends on the key alone, filters, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.penalties import Adjustment, Penalties
from agentspeed_engine.exec.sampler import draw, gumbel
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_engine.protocol.sampling import LEAST_TEMPERATURE, validate_sampling
from agentspeed_engine.protocol.token_ids import pack_ids

KEY = (1, 2, 3)
LOGITS = np.array([0.0, 2.0, 1.0, -1.0, 2.0])


def draws(sampling: Sampling, count: int = 4000, logits: np.ndarray = LOGITS) -> np.ndarray:
    """How often each id is drawn over many positions."""
    ids = [draw(logits, sampling, KEY, position).id for position in range(count)]
    return np.bincount(ids, minlength=len(logits)) / count


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max())
    return exp / exp.sum()


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert draw(LOGITS, Sampling(), KEY, 0).id == 1
    assert draw(LOGITS.astype(np.float32), Sampling(), KEY, 7).id == 1


def test_sampling_follows_the_distribution() -> None:
    assert draws(Sampling(temperature=1.0)) == pytest.approx(softmax(LOGITS), abs=0.03)
    assert draws(Sampling(temperature=2.0)) == pytest.approx(softmax(LOGITS / 2), abs=0.03)


@given(seed=st.integers(-(2**63), 2**64 - 1), serial=st.integers(0, 2**40), position=st.integers(0, 2**40))
def test_noise_is_finite_and_a_function_of_key_position_and_id(seed: int, serial: int, position: int) -> None:
    ids = np.array([0, 5, 129_279])
    noise = gumbel((seed, serial, 0), position, ids)
    assert np.isfinite(noise).all()
    for index in range(3):
        assert gumbel((seed, serial, 0), position, ids[index : index + 1])[0] == noise[index]
    assert (gumbel((seed, serial, 1), position, ids) != noise).all()
    assert (gumbel((seed, serial, 0), position + 1, ids) != noise).all()
    assert (gumbel((seed, serial + 1, 0), position, ids) != noise).all()


def test_noise_looks_like_gumbel_noise() -> None:
    noise = gumbel(KEY, 5, np.arange(200_000))
    assert noise.mean() == pytest.approx(0.57722, abs=0.01)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)


def test_neighbouring_positions_and_keys_are_uncorrelated() -> None:
    ids = np.arange(50_000)
    base = gumbel((0, 0, 0), 0, ids)
    for key, position in (((0, 0, 0), 1), ((1, 0, 0), 0), ((0, 1, 0), 0), ((0, 0, 1), 0)):
        assert abs(np.corrcoef(base, gumbel(key, position, ids))[0, 1]) < 0.02


def test_top_k_keeps_k_ids_and_all_that_tie_with_the_last() -> None:
    assert set(np.flatnonzero(draws(Sampling(temperature=5.0, top_k=1)))) == {1, 4}
    assert set(np.flatnonzero(draws(Sampling(temperature=5.0, top_k=3)))) == {1, 2, 4}
    assert set(np.flatnonzero(draws(Sampling(temperature=5.0, top_k=50)))) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    for top_p, kept in ((0.4, {0}), (0.5, {0}), (0.7, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        frequencies = draws(Sampling(temperature=1.0, top_p=top_p), logits=logits)
        assert set(np.flatnonzero(frequencies)) == kept, top_p


def test_min_p_keeps_ids_near_the_best() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert set(np.flatnonzero(draws(Sampling(temperature=1.0, min_p=0.5), logits=logits))) == {0, 1}


def test_a_mask_excludes_ids_from_every_kind_of_draw() -> None:
    allowed = np.array([True, False, False, True, False])
    assert draw(LOGITS, Sampling(), KEY, 0, allowed).id == 0
    ids = {draw(LOGITS, Sampling(temperature=3.0, top_k=4), KEY, at, allowed).id for at in range(200)}
    assert ids == {0, 3}


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    chosen = draw(LOGITS, Sampling(temperature=0.1, top_k=1, logprobs=3), KEY, 0)
    expected = np.log(softmax(LOGITS))
    assert chosen.logprob == pytest.approx(expected[chosen.id])
    assert [number for number, _ in chosen.top] == [1, 4, 2]
    assert [value for _, value in chosen.top] == pytest.approx(expected[[1, 4, 2]])
    assert draw(LOGITS, Sampling(logprobs=0), KEY, 0).top == ()
    assert draw(LOGITS, Sampling(), KEY, 0).logprob is None


RULES = (
    Sampling(temperature=1.0, logprobs=0),
    Sampling(temperature=0.5, logprobs=0),
    Sampling(temperature=2.0, top_k=3, logprobs=0),
    Sampling(temperature=1.0, top_p=0.6, min_p=0.2, logprobs=0),
)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("allowed", [None, np.array([True, False, True, True, False])])
@pytest.mark.parametrize("adjusted", [False, True])
def test_the_drawn_logprob_is_of_the_distribution_that_drew(
    rule: Sampling, allowed: np.ndarray | None, adjusted: bool
) -> None:
    """Its probabilities are those with which ids are drawn, and they add up to 1."""
    adjustment = (
        Adjustment(np.array([1, 3]), np.array([2.0, 1.0], np.float32), np.array([0.0, 1.5], np.float32))
        if adjusted
        else None
    )
    chosen = [draw(LOGITS, rule, KEY, position, allowed, adjustment) for position in range(4000)]
    told = {one.id: math.exp(one.draw_logprob) for one in chosen if one.draw_logprob is not None}
    assert sum(told.values()) == pytest.approx(1.0)
    counts = np.bincount([one.id for one in chosen], minlength=5) / len(chosen)
    assert [told.get(number, 0.0) for number in range(5)] == pytest.approx(counts, abs=0.03)
    raw = np.log(softmax(LOGITS))
    assert all(one.logprob == pytest.approx(raw[one.id]) for one in chosen), "the other one is the model's own"


def test_a_greedy_draw_was_certain_and_nothing_is_told_unasked() -> None:
    assert draw(LOGITS, Sampling(logprobs=0), KEY, 0).draw_logprob == 0.0
    assert draw(LOGITS, Sampling(temperature=1.0), KEY, 0).draw_logprob is None


def test_a_penalty_and_a_bias_change_what_is_drawn_from_as_their_definitions_say() -> None:
    """Repetition divides what is above 0 and multiplies what is below; the rest is subtracted and added."""
    spec = penalised(
        Sampling(
            repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((0, 7.0), (3, -1.0))
        ),
        seen=[1, 3, 3],
        counted=[3],
    )
    penalties = Penalties(spec, 5)
    assert penalties.at(0).of(LOGITS).tolist() == [7.0, 1.0, 1.0, -1.0 * 2 - 0.75 - 1, 2.0]
    for token in (2, 2):
        penalties.drew(token)
    assert penalties.at(2).of(LOGITS).tolist() == [7.0, 1.0, 1.0 / 2 - 1.25, -3.75, 2.0]
    assert penalties.at(1).of(LOGITS).tolist() == [7.0, 1.0, 1.0 / 2 - 0.75, -3.75, 2.0], "a draw was not taken"
    assert penalties.at(0).of(LOGITS).tolist() == [7.0, 1.0, 1.0, -3.75, 2.0]
    assert LOGITS.tolist() == [0.0, 2.0, 1.0, -1.0, 2.0], "they are not changed themselves"


def test_what_the_model_rules_out_stays_so_and_nothing_becomes_infinite() -> None:
    logits = np.array([-np.inf, 3e38, -3e38, 1.0, 0.0], np.float32)
    spec = penalised(Sampling(repetition_penalty=0.01, logit_bias=((0, 100.0),)), seen=[0, 1, 2, 3, 4])
    changed = Penalties(spec, 5).at(0).of(logits)
    assert changed.dtype == np.float32 and changed[0] == -np.inf
    assert np.isfinite(changed[1:]).all() and changed[3] == pytest.approx(100.0)


def penalised(sampling: Sampling, *, seen: Sequence[int] = (), counted: Sequence[int] = ()) -> TurnSpec:
    return TurnSpec(turn=1, branch=BranchId(1), sampling=sampling, draw_key=KEY, stop_strings=(), grammar=None,
                    consumed_ids=(), prompt_tokens=len(seen), seen=pack_ids(seen),
                    counted=pack_ids(counted))  # fmt: skip


def test_more_top_logprobs_than_ids_are_all_ids() -> None:
    assert len(draw(LOGITS, Sampling(logprobs=20), KEY, 0).top) == 5


def test_ids_of_no_probability_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf])
    assert {draw(logits, Sampling(temperature=2.0), KEY, at).id for at in range(50)} == {1}


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-308, 1e-307, 1e-300, 1e-30, LEAST_TEMPERATURE / 2])
@pytest.mark.parametrize("logits", [LOGITS, LOGITS * 1e300, LOGITS.astype(np.float32), -LOGITS * 80])
def test_a_tiny_temperature_draws_what_greedy_does(temperature: float, logits: np.ndarray) -> None:
    greedy = draw(logits, Sampling(logprobs=2), KEY, 0)
    for position in range(50):
        assert draw(logits, Sampling(temperature=temperature, logprobs=2, top_p=0.9), KEY, position) == greedy


@pytest.mark.parametrize("temperature", [LEAST_TEMPERATURE, 1e-3, 1.0, 1e3])
def test_logits_of_any_size_can_be_sampled(temperature: float) -> None:
    huge = np.array([-1.7e308, 1.7e308, 0.0])
    assert {draw(huge, Sampling(temperature=temperature), KEY, position).id for position in range(50)} == {1}


def test_the_highest_temperature_draws_every_id_alike() -> None:
    assert draws(Sampling(temperature=1e308)) == pytest.approx(np.full(5, 0.2), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0])
@pytest.mark.parametrize(
    "bad", [[math.nan] * 5, [0.0, math.nan, 1.0, 2.0, 3.0], [-math.inf] * 5, [math.inf, 0, 0, 0, 0]]
)
def test_logits_that_are_no_numbers_are_refused_with_the_reason(temperature: float, bad: list[float]) -> None:
    with pytest.raises(EngineFault, match="logits") as fault:
        draw(np.array(bad), Sampling(temperature=temperature), KEY, 0)
    assert fault.value.code == "bad_weights"
    assert fault.value.remedy
    with pytest.raises(EngineFault, match="logits"):
        draw(np.array(bad), Sampling(temperature=temperature), KEY, 0, np.array([True, False, False, False, False]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_leaves_only_impossible_ids_is_refused(temperature: float) -> None:
    with pytest.raises(EngineFault, match="grammar"):
        draw(np.array([-np.inf, 0.0]), Sampling(temperature=temperature), KEY, 0, np.array([True, False]))


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(temperature=-0.1), "temperature"), (Sampling(temperature=math.nan), "temperature"),
        (Sampling(temperature=math.inf), "temperature"), (Sampling(top_k=0), "top_k"), (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.1), "top_p"), (Sampling(min_p=-0.1), "min_p"), (Sampling(logprobs=21), "logprobs"),
        (Sampling(logprobs=-1), "logprobs"), (Sampling(top_p=math.nan), "top_p"), (Sampling(min_p=math.nan), "min_p"),
        (Sampling(frequency_penalty=2.1), "frequency_penalty"), (Sampling(presence_penalty=-2.1), "presence_penalty"),
        (Sampling(presence_penalty=math.nan), "presence_penalty"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty"),
        (Sampling(repetition_penalty=math.inf), "repetition_penalty"),
        (Sampling(logit_bias=((5, 1.0),)), "an id of logit_bias is 5"),
        (Sampling(logit_bias=((-1, 1.0),)), "an id of logit_bias is -1"),
        (Sampling(logit_bias=((2, 100.5),)), "logit_bias of id 2 is 100.5"),
        (Sampling(logit_bias=((2, math.nan),)), "logit_bias of id 2"),
        (Sampling(logit_bias=((2, 1.0),) * 1025), "logit_bias names 1025 ids"),
    ],
)  # fmt: skip
def test_bad_values_are_named_with_what_they_may_be(sampling: Sampling, name: str) -> None:
    with pytest.raises(EngineFault, match=name) as fault:
        validate_sampling(sampling, 5)
    assert fault.value.code == "invalid_sampling"
    assert fault.value.remedy
