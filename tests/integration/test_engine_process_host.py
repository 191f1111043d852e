"""Sessions that were moved to host memory and back draw exactly what undisturbed ones draw (float64, real model)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentspeed_engine.protocol import messages as wire
from tests.devices import DEVICES
from tests.support.cache_formats import POOLED, Pooled
from tests.support.engine_client import Front, engine, until

OPTIONS = {
    "dtype": "float64",
    "page_tokens": 16,
    "context_limit": 400,
    "threads": 1,
    "check_every_step": True,
    "firm_pages": 0,
    "host_saves": "always",
    "ticket_deadline": 60.0,
}
"""Whatever copies and prefill cost on the machine."""
HOT = wire.Sampling(temperature=1.2, logprobs=0)
SESSIONS, PROMPT = 5, 200
PAGES = 40
"""Room for about three of the five sessions; one turn of the context limit needs 26."""


@pytest.fixture(scope="module", params=POOLED.values(), ids=POOLED.keys())
def pooled(request: pytest.FixtureRequest) -> Pooled:
    found: Pooled = request.param
    return found


@pytest.fixture(scope="module")
def checkpoint(pooled: Pooled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pooled.checkpoint(tmp_path_factory.mktemp("tiny"), seed=6)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def roomy(checkpoint: Path, pooled: Pooled, device: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    given = {**pooled.on(device), **OPTIONS}
    with engine(tmp_path_factory.mktemp("engine"), model=str(checkpoint), pages=400, **given) as process:
        yield process.connect()


def test_turns_resumed_from_the_host_draw_what_undisturbed_ones_draw(
    checkpoint: Path, pooled: Pooled, device: Any, roomy: Front, tmp_path: Path
) -> None:
    draw = random.Random(1)
    prompts = [[draw.randrange(512) for _ in range(PROMPT)] for _ in range(SESSIONS)]
    given = {**pooled.on(device), **OPTIONS}
    with engine(tmp_path, model=str(checkpoint), pages=PAGES, host_slots=200, **given) as process:
        front = process.connect()
        branches = [front.open() for _ in prompts]
        logs: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        resumed = recomputed = 0
        for turn_number in range(4):
            for number, branch in enumerate(branches):
                new = prompts[number] if turn_number == 0 else [number, turn_number, 9]
                turn = front.generate(branch, new, max_tokens=6, sampling=HOT, seed=turn_number)
                assert turn.ended is not None
                resumed += turn.ended.usage.resumed_host
                recomputed += turn.ended.usage.recomputed
                logs[number] += [*new, *turn.ids]
                logprobs[number] += turn.logprobs
                front.ask(wire.Expect(request=front.number(), branch=branch, seconds=60.0), wire.LeaseAnswer)
        assert resumed > 5 * PROMPT, "most of what did not fit came back from the host"
        assert recomputed < resumed / 4
    for number, log in enumerate(logs):
        check = roomy.open(private=True)
        at, drawn = 0, []
        for turn_number in range(4):
            new = PROMPT if turn_number == 0 else 3
            turn = roomy.generate(check, log[at : at + new], max_tokens=6, sampling=HOT, seed=turn_number)
            assert turn.ids == log[at + new : at + new + 6]
            at += new + 6
            drawn += turn.logprobs
        assert drawn == pytest.approx(logprobs[number], abs=1e-10)


def test_a_session_at_rest_shows_where_its_rows_are(
    checkpoint: Path, pooled: Pooled, device: Any, tmp_path: Path
) -> None:
    draw = random.Random(2)
    given = {**pooled.on(device), **OPTIONS}
    with engine(tmp_path, model=str(checkpoint), pages=PAGES, host_slots=200, **given) as process:
        front = process.connect()
        branches = [front.open() for _ in range(SESSIONS)]
        for branch in branches:
            front.generate(branch, [draw.randrange(512) for _ in range(PROMPT)], max_tokens=2)
        residences = [front.inspect(branch).residence for branch in branches]
        assert any(residence.host > PROMPT // 2 for residence in residences)
        for branch, residence in zip(branches, residences, strict=True):
            assert residence.device + residence.host + residence.lost == front.inspect(branch).known
        for branch in branches:
            front.end(branch)
        until("no copy is in flight", lambda: front.counts().get("tickets", 0) == 0)
        counts = front.counts()
        assert counts["pages_free"] + counts["pages_nodes"] == counts["pages_total"]
