"""An engine with batch_invariant says the same to the last bit, whatever else it computes and pages out meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from agentspeed.engine import NANO
from agentspeed_engine.protocol import messages as wire
from tests.devices import DEVICES
from tests.support.engine_client import Front, TurnRecord, engine

pytestmark = pytest.mark.timeout(300)

HOT = wire.Sampling(temperature=1.1, top_k=200, top_p=0.98, min_p=0.001, logprobs=2)
GREEDY = wire.Sampling(logprobs=2)


@pytest.fixture(scope="module", params=["dtype", "fp8"])
def cache(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module", params=DEVICES)
def front(request: pytest.FixtureRequest, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Of a pool that the tests' sessions do not all fit into."""
    options: dict[str, Any] = {"pages": 40, "host_slots": 80, "context_limit": 1024, "prefill_chunk": 192}
    options |= {"host_saves": "always", "ticket_deadline": 60.0}
    device, dtype = request.param, "bfloat16" if request.param == "cuda" else "float32"
    with engine(tmp_path_factory.mktemp("engine"), model=str(NANO), device=device, dtype=dtype, kv_cache_dtype=cache,
                batch_invariant=True, check_every_step=True, **options) as process:  # fmt: skip
        front = process.connect()
        front.socket.settimeout(120.0)
        yield front


def told(turn: TurnRecord) -> tuple[Any, ...]:
    return turn.ids, turn.logprobs, turn.draw_logprobs, turn.top


def alone(front: Front, ids: list[int], **options: Any) -> TurnRecord:
    branch = front.open(private=True)
    turn = front.generate(branch, ids, **options)
    front.end(branch)
    return turn


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_turns_that_run_together_say_what_each_says_alone(front: Front, sampling: wire.Sampling) -> None:
    draw = random.Random(6)
    trunk_ids = [draw.randrange(3, 1024) for _ in range(300)]
    trunk = front.open(trunk_ids)
    children = front.fork(trunk, 9)
    asked = [[5 + index, *(draw.randrange(3, 1024) for _ in range(30 * index))] for index in range(len(children))]
    turns = [front.start(child, ids, max_tokens=12, sampling=sampling, seed=index)
             for index, (child, ids) in enumerate(zip(children, asked, strict=True))]  # fmt: skip
    front.finish(*turns)
    for branch in (*children, trunk):
        front.end(branch)
    for index, (turn, ids) in enumerate(zip(turns, asked, strict=True)):
        wanted = alone(front, [*trunk_ids, *ids], max_tokens=12, sampling=sampling, seed=index)
        assert told(turn) == told(wanted)


def test_sessions_that_lost_their_pages_go_on_with_the_bits_they_would_have_had(front: Front) -> None:
    draw = random.Random(8)
    held = [(front.open(), [draw.randrange(3, 1024) for _ in range(400)]) for _ in range(8)]
    logs = []
    for branch, ids in held:
        turn = front.generate(branch, ids, max_tokens=4, sampling=GREEDY, seed=0)
        logs.append(ids + turn.ids)
    later = [front.start(branch, [9], max_tokens=6, sampling=HOT, seed=1) for branch, _ in held]
    front.finish(*later)
    for branch, _ in held:
        front.end(branch)
    assert sum(turn.ended.usage.resumed_host for turn in later if turn.ended) > 400, "a session, at least"
    for turn, log in zip(later, logs, strict=True):
        assert told(turn) == told(alone(front, [*log, 9], max_tokens=6, sampling=HOT, seed=1))
