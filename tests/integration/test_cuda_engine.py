"""The shipped model on a GPU: tokens of the float64 definition on a CPU, whatever is shared, batched or paged out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agentspeed import Choice, Engine, Session, User
from agentspeed.engine import NANO
from agentspeed_engine.protocol import messages as wire
from tests.devices import needs_gpu
from tests.support.engine_client import Front, TurnRecord, engine

pytestmark = [needs_gpu, pytest.mark.timeout(300)]

COMMON = {"model": str(NANO), "prefill_chunk": 384, "context_limit": 2048, "threads": 4}
GREEDY = wire.Sampling(logprobs=2)
HOT = wire.Sampling(temperature=1.1, top_k=200, top_p=0.98, min_p=0.001, logprobs=2)
PENALISED = msgspec.structs.replace(
    HOT, frequency_penalty=0.4, presence_penalty=-0.3, repetition_penalty=1.3, logit_bias=((3, 2.0), (500, -50.0))
)
NEAR = 1e-3
"""Natural logarithms of probabilities: below this margin float32 may order two ids otherwise."""


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with engine(tmp_path_factory.mktemp("cpu"), device="cpu", dtype="float64", pages=400, **COMMON) as process:
        yield process.connect()


@pytest.fixture(scope="module", params=[0, 1], ids=["depth0", "depth1"])
def fast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("cuda")
    with engine(folder, device="cuda", dtype="float32", pages=400, depth=request.param, check_every_step=True,
                **COMMON) as process:  # fmt: skip
        assert any(line.startswith("cuda: ") for line in process.progress)
        front = process.connect()
        front.socket.settimeout(120.0)
        yield front


def drawn(front: Front, ids: list[int], tokens: int, sampling: wire.Sampling, seed: int) -> TurnRecord:
    branch = front.open(private=True)
    turn = front.generate(branch, ids, max_tokens=tokens, sampling=sampling, seed=seed)
    front.end(branch)
    return turn


def assert_agrees(exact: Front, ids: list[int], turn: TurnRecord, sampling: wire.Sampling, seed: int) -> None:
    """Equal ids, up to the first whose choice float32 may see otherwise, and log-probabilities as near as it allows."""
    wanted = drawn(exact, ids, len(turn.ids), sampling, seed)
    for at, (got, right) in enumerate(zip(turn.ids, wanted.ids, strict=False)):
        if got != right:
            best = sorted((one.logprob for one in wanted.top[at]), reverse=True)
            near = best[0] - best[1] < NEAR if sampling.temperature == 0 else at >= 3
            assert near, f"token {at} of {len(ids)} + {turn.ids}, wanted {wanted.ids}, {wanted.top[at]}"
            return
        assert turn.logprobs[at] == pytest.approx(wanted.logprobs[at], abs=2e-3)
        assert turn.draw_logprobs[at] == pytest.approx(wanted.draw_logprobs[at], abs=2e-2)


def prompt(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(3, 1024) for _ in range(tokens)]


@pytest.mark.parametrize("sampling", [GREEDY, HOT, PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 129, 700])
def test_a_fresh_prompt_draws_what_the_definition_draws(
    exact: Front, fast: Front, tokens: int, sampling: wire.Sampling
) -> None:
    """On both sides of the size from which the context is decompressed."""
    ids = prompt(random.Random(tokens), tokens)
    assert_agrees(exact, ids, drawn(fast, ids, 12, sampling, 3), sampling, 3)


@pytest.mark.parametrize("seed", range(2))
def test_every_branch_of_a_random_tree_draws_what_the_definition_draws(exact: Front, fast: Front, seed: int) -> None:
    draw = random.Random(seed)
    ids = prompt(draw, 200)
    nodes = [(fast.open(ids), ids)]
    for step in range(14):
        at = draw.randrange(len(nodes))
        branch, ids = nodes[at]
        match draw.choice(["generate", "generate", "fork", "rewind"]):
            case "fork" if len(nodes) < 8:
                cut = draw.randrange(len(ids) + 1)
                nodes += [(child, ids[:cut]) for child in fast.fork(branch, 2, cut)]
            case "rewind":
                cut = draw.randrange(1, len(ids) + 1)
                fast.rewind(branch, cut)
                nodes[at] = (branch, ids[:cut])
            case _:
                new = prompt(draw, draw.randrange(1, 40))
                turn = fast.generate(branch, new, max_tokens=8, sampling=GREEDY, seed=step)
                assert_agrees(exact, ids + new, turn, GREEDY, step)
                nodes[at] = (branch, ids + new + turn.ids)


def test_siblings_that_run_together_draw_what_each_draws_alone(exact: Front, fast: Front) -> None:
    draw = random.Random(6)
    trunk_ids = prompt(draw, 300)
    trunk = fast.open(trunk_ids)
    children = fast.fork(trunk, 9)
    turns = [fast.start(child, [5 + index], max_tokens=15, sampling=GREEDY, seed=index)
             for index, child in enumerate(children)]  # fmt: skip
    fast.finish(*turns)
    for index, turn in enumerate(turns):
        assert_agrees(exact, [*trunk_ids, 5 + index], turn, GREEDY, index)


def test_sessions_that_were_paged_out_to_the_host_go_on_as_if_never(exact: Front, tmp_path: Path) -> None:
    draw = random.Random(8)
    with engine(tmp_path, device="cuda", dtype="float32", pages=36, host_slots=120,
                host_saves="always", ticket_deadline=60.0, **COMMON) as process:  # fmt: skip
        front = process.connect()
        front.socket.settimeout(120.0)
        held = [(front.open(), prompt(draw, 400)) for _ in range(6)]
        logs, resumed = [], 0
        for branch, ids in held:
            turn = front.generate(branch, ids, max_tokens=4, sampling=GREEDY, seed=0)
            logs.append(ids + turn.ids)
        for (branch, _), log in zip(held, logs, strict=True):
            turn = front.generate(branch, [9], max_tokens=6, sampling=GREEDY, seed=1)
            assert_agrees(exact, [*log, 9], turn, GREEDY, 1)
            assert turn.ended is not None
            resumed += turn.ended.usage.resumed_host
        assert resumed > 400, "a session, at least"


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: Its name.
    """
    return f"sunny in {city}"


@pytest.mark.anyio
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_sessions_work_as_they_do_on_a_cpu(anyio_backend: Any, dtype: str) -> None:
    async with Engine(device="cuda", dtype=dtype, depth=1) as running, Session(running) as s:
        reply = await s.generate("Say hello.", max_tokens=12)
        assert reply.ids
        mark = await s.mark()
        async with s.fork(3) as branches:
            replies = [await branch.generate("Go on.", max_tokens=8, temperature=1.0) for branch in branches]
            assert all(one.usage.resumed_device or one.usage.shared for one in replies)
            await s.adopt(branches[0])
        await s.rewind(mark)
        assert (await s.generate("And now?", max_tokens=4)).ids
        found = await s.generate([User("Is it so?")], output=Choice("yes", "no"), max_tokens=16)
        assert found.output in ("yes", "no")


@pytest.mark.anyio
async def test_a_model_on_a_gpu_calls_its_tools(anyio_backend: Any) -> None:
    async with Engine(device="cuda") as running, Session(running, tools=[weather]) as s:
        done = await s.run("What is the weather in Paris?", max_turns=4, max_tokens=64)
        assert done.text is not None
