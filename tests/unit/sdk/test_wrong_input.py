"""Wrong input to the SDK: each is our own error that names the argument, at the call, and the session stays usable."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agentspeed import Engine, Sampling, Session, User, tool
from agentspeed.errors import AgentspeedError, ChildUnrelated, InvalidRequest, InvalidSampling, MarkNotFound
from agentspeed.search import Budget, best_of_n
from agentspeed.testing import ScriptedEngine

pytestmark = pytest.mark.anyio
LONE = "\ud800 half a character"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"temperature": "hot"}, InvalidSampling, "temperature is 'hot'"),
        ({"temperature": True}, InvalidSampling, "temperature is True"),
        ({"sampling": Sampling(top_k=1.5)}, InvalidSampling, "top_k is 1.5"),  # type: ignore[arg-type]
        ({"sampling": Sampling(top_p="all")}, InvalidSampling, "top_p is 'all'"),  # type: ignore[arg-type]
        ({"sampling": Sampling(min_p=None)}, InvalidSampling, "min_p is None"),  # type: ignore[arg-type]
        ({"sampling": Sampling(logit_bias=[5])}, InvalidSampling, r"logit_bias is \[5\]"),  # type: ignore[arg-type]
        ({"sampling": Sampling(logit_bias={"5": 1})}, InvalidSampling, "an id of logit_bias is '5'"),  # type: ignore[dict-item]
        ({"sampling": Sampling(logit_bias={5: "no"})}, InvalidSampling, "the logit_bias of id 5 is 'no'"),  # type: ignore[dict-item]
        ({"sampling": Sampling(presence_penalty=None)}, InvalidSampling, "presence_penalty is None"),  # type: ignore[arg-type]
        ({"sampling": "greedy"}, InvalidRequest, "sampling is 'greedy'"),
        ({"sampling": {"temperature": 1}}, InvalidRequest, "sampling is {"),
        ({"logprobs": "all"}, InvalidSampling, "logprobs is 'all'"),
        ({"max_tokens": True}, InvalidRequest, "max_tokens is True"),
        ({"max_tokens": 2**80}, InvalidRequest, "max_tokens is"),
        ({"seed": 2**80}, InvalidRequest, "seed is"),
        ({"seed": True}, InvalidRequest, "seed is True"),
        ({"stop": 5}, InvalidRequest, "stop is 5"),
        ({"stop": LONE}, InvalidRequest, "stop holds half a character"),
        ({"timeout": "5"}, InvalidRequest, "timeout is '5'"),
        ({"timeout": True}, InvalidRequest, "timeout is True"),
        ({"parallel_calls": 0}, InvalidRequest, "parallel_calls is 0"),
        ({"parallel_calls": "two"}, InvalidRequest, "parallel_calls is 'two'"),
        ({"keep_on_cancel": "yes"}, InvalidRequest, "keep_on_cancel is 'yes'"),
        ({"top_p": 0.5}, InvalidRequest, r"Give them as sampling=Sampling\(top_p=...\)"),
    ],
)
async def test_a_wrong_option_of_a_turn_is_named(options: Any, error: type[AgentspeedError], told: str) -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        known = s.tokens
        with pytest.raises(error, match=told):
            _ = await s.generate("Hi", **options)
        assert (s.tokens, s.messages) == (known, ())
        assert (await s.generate("Hi")).text == "Fine."


@pytest.mark.parametrize(
    ("prompt", "told"),
    [(LONE, "holds half a character"), (User(5), "text is 5"), (User(LONE), "holds half a character")],  # type: ignore[arg-type]
)
async def test_a_text_that_is_none_is_refused_before_it_enters_the_log(prompt: Any, told: str) -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        for call in (s.generate, s.add, s.run):
            with pytest.raises(InvalidRequest, match=told):
                _ = await call(prompt)
        assert s.messages == ()
        assert (await s.generate("Hi")).text == "Fine."


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"system": 5}, "system is 5"),
        ({"system": LONE}, "system holds half a character"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"seed": 2**80}, "seed is"),
        ({"tenant": 5}, "tenant is 5"),
        ({"name": 5}, "name is 5"),
        ({"private": "x"}, "private is 'x'"),
        ({"timeout": -1}, "timeout is -1"),
        ({"close_timeout": -1}, "close_timeout is -1"),
        ({"sampling": 3}, "sampling is 3"),
        ({"temperature": 0.5}, "has no options temperature.*Options of a turn are given to generate"),
    ],
)
def test_a_wrong_option_of_a_session_is_refused_when_it_is_made(options: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        _ = Session(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pagse": 5}, "pagse"),
        ({"pages": -1}, "pages is -1"),
        ({"policy": "x"}, "no policy 'x'"),
        ({"dtype": "x"}, "dtype"),
    ],
)
async def test_a_wrong_option_of_an_engine_is_no_fault_of_the_model(options: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        async with Engine(**options):
            raise AssertionError("started")


@pytest.mark.parametrize("model", [5, b"model"])
def test_a_model_that_is_no_path_is_refused(model: Any) -> None:
    with pytest.raises(InvalidRequest, match="model is "):
        _ = Engine(model)


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True])
async def test_a_fork_into_no_number_of_children_is_refused(n: Any) -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        with pytest.raises(InvalidRequest, match="n is "):
            _ = s.fork(n)
        with pytest.raises(InvalidRequest, match="n is "):
            _ = await best_of_n(s, "Hi", n=n, score=lambda node: 1.0)


@pytest.mark.parametrize("to", [1.5, None, b"x"])
async def test_a_place_that_is_none_is_refused(to: Any) -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        with pytest.raises(MarkNotFound, match="is no mark, name or position"):
            await s.rewind(to)


async def test_a_mark_is_named_by_a_text() -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        for name in (5, ""):
            with pytest.raises(InvalidRequest, match="name is "):
                _ = await s.mark(name)  # type: ignore[arg-type]


async def test_only_another_session_can_be_adopted() -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        for other in (s, None):
            with pytest.raises(ChildUnrelated):
                await s.adopt(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"seconds": "1"}, {"seconds": True}, {"seconds": 1, "keep": "hard"}])
async def test_a_lease_is_asked_for_in_seconds_and_by_its_kind(options: Any) -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        with pytest.raises(InvalidRequest, match=r"seconds is|keep is 'hard'"):
            _ = await s.expect(**options)


def add(a: int) -> int:
    """A tool."""
    return a


@pytest.mark.parametrize(("sign", "bits"), [(1, 63), (1, 64), (-1, 64), (1, 80), (1, 1_500), (1, 20_000)])
async def test_a_whole_number_that_no_frame_can_carry_is_refused_wherever_it_is_given(sign: int, bits: int) -> None:
    size = sign * 2**bits
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        for keep in ("soft", "firm"):
            with pytest.raises(InvalidRequest, match=r"seconds is .* at most 63 bits"):
                _ = await s.expect(size, keep=keep)
        for options in (
            {"max_tokens": size},
            {"temperature": size},
            {"sampling": Sampling(top_p=size)},
            {"sampling": Sampling(top_k=size)},
            {"logprobs": size},
            {"seed": size},
            {"timeout": size},
            {"parallel_calls": size},
        ):
            with pytest.raises((InvalidRequest, InvalidSampling), match=r" is .* at most 63 bits"):
                _ = await s.generate("Hi", **options)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match=r"n is .* at most 63 bits"):
            _ = s.fork(size)
        with pytest.raises(InvalidRequest, match=r"expect is .* at most 63 bits"):
            _ = await s.run("Hi", expect=size)
        with pytest.raises(MarkNotFound, match="Position "):
            await s.rewind(size)
        with pytest.raises(InvalidRequest, match=r"pages is .* at most 63 bits"):
            _ = Engine(pages=size)
        with pytest.raises(ValueError, match="timeout is "):
            _ = tool(timeout=size)(add)
        assert (await s.generate("Hi")).text == "Fine."


@pytest.mark.parametrize("options", [{"max_turns": 1.5}, {"output_retries": "1"}, {"expect": -1}, {"on_event": 5}])
async def test_a_run_refuses_wrong_bounds_before_its_first_turn(options: Any) -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        with pytest.raises(InvalidRequest, match=f"{next(iter(options))} is "):
            _ = await s.run("Hi", **options)
        assert engine.turns == ()


@pytest.mark.parametrize("options", [{"tokens": "5"}, {"tokens": 1.5}, {"branches": 1.5}, {"seconds": math.nan}])
def test_a_budget_is_made_of_numbers(options: Any) -> None:
    with pytest.raises(InvalidRequest, match="Budget "):
        _ = Budget(**options)


async def test_a_score_that_is_no_number_is_refused() -> None:
    async with ScriptedEngine(["Fine."] * 2) as engine, engine.session() as s:
        with pytest.raises(InvalidRequest, match="score gave None"):
            _ = await best_of_n(s, "Hi", n=2, score=lambda node: None)  # type: ignore[arg-type, return-value]
        assert s.messages == ()


async def test_a_snapshot_is_bytes_and_keeps_its_system_text() -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session(system="Be brief.") as s:
        data = await s.snapshot()
    with pytest.raises(InvalidRequest, match="This is no session snapshot"):
        _ = Session.restore("junk")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="system text is in the log"):
        _ = Session.restore(data, system="Be long.")
    assert Session.restore(data, system="Be brief.").system == "Be brief."


class Unshowable:
    def __repr__(self) -> str:
        raise AttributeError("missing")


@pytest.mark.anyio
async def test_a_value_that_cannot_be_shown_is_refused_like_any_other() -> None:
    odd: Any = Unshowable()
    with pytest.raises(InvalidRequest, match="a Unshowable that cannot be shown"):
        _ = Engine(odd)
    async with ScriptedEngine(["Hello."]) as engine, engine.session() as s:
        for call in (
            lambda: s.generate(odd),
            lambda: s.generate("x", stop=odd),
            lambda: s.add(odd),
            lambda: s.run("x", on_event=odd),
            lambda: s.generate("x", sampling=odd),
            lambda: s.generate("x", max_tokens=odd),
        ):
            with pytest.raises(AgentspeedError, match="a Unshowable that cannot be shown"):
                _ = await call()
        with pytest.raises(MarkNotFound, match="a Unshowable that cannot be shown"):
            await s.rewind(odd)
        with pytest.raises(ChildUnrelated, match="a Unshowable that cannot be shown"):
            await s.adopt(odd)
