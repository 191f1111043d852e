"""Forks, rewinds, preemptions and batches draw exactly what a new session alone would draw (float64, real model)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agentspeed_engine.protocol import messages as wire
from tests.devices import DEVICES
from tests.support.cache_formats import POOLED, Pooled
from tests.support.engine_client import EngineProcess, Front, TurnRecord, engine

OPTIONS = {
    "dtype": "float64",
    "page_tokens": 16,
    "context_limit": 1024,
    "threads": 1,
    "check_every_step": True,
    "prefill_chunk": 96,
    "extend_tokens": 40,
}
HOT = wire.Sampling(temperature=1.3, top_k=200, top_p=0.98, min_p=0.001, logprobs=2)
PENALISED = msgspec.structs.replace(
    HOT, frequency_penalty=0.4, presence_penalty=-0.3, repetition_penalty=1.3, logit_bias=((3, 2.0), (500, -50.0))
)
LOGPROB_TOLERANCE = 1e-10
"""Of float64 logprobs: batches of other shapes may sum in another order."""


@pytest.fixture(scope="module", params=POOLED.values(), ids=POOLED.keys())
def pooled(request: pytest.FixtureRequest) -> Pooled:
    found: Pooled = request.param
    return found


@pytest.fixture(scope="module")
def checkpoint(pooled: Pooled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pooled.checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def running(
    checkpoint: Path, pooled: Pooled, device: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("engine")
    with engine(folder, model=str(checkpoint), pages=600, **pooled.on(device), **OPTIONS) as process:
        yield process


@pytest.fixture(scope="module")
def front(running: EngineProcess) -> Front:
    return running.connect()


def prompt(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(512) for _ in range(tokens)]


def fresh(front: Front, ids: list[int], tokens: int, sampling: wire.Sampling, seed: int) -> TurnRecord:
    """What a session that shares nothing with any other draws after `ids`, all of them computed anew."""
    branch = front.open(private=True)
    turn = front.generate(branch, ids, max_tokens=tokens, sampling=sampling, seed=seed)
    assert turn.started is not None and turn.started.usage.new == len(ids)
    front.end(branch)
    return turn


def assert_same(front: Front, ids: list[int], turn: TurnRecord, sampling: wire.Sampling, seed: int) -> None:
    expected = fresh(front, ids, len(turn.ids), sampling, seed)
    assert turn.ids == expected.ids
    assert turn.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)
    assert turn.draw_logprobs == pytest.approx(expected.draw_logprobs, abs=1e-6), "edges of top_p are sums of shares"


@dataclass
class Node:
    """A branch of a random tree beside the ids it must have."""

    branch: int
    ids: list[int]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sampling", [wire.Sampling(logprobs=0), HOT], ids=["greedy", "sampled"])
def test_every_branch_of_a_random_tree_draws_what_a_fresh_session_draws(
    front: Front, seed: int, sampling: wire.Sampling
) -> None:
    draw = random.Random(seed)
    ids = prompt(draw, draw.randrange(1, 150))
    nodes = [Node(front.open(ids), ids)]
    for step in range(24):
        node = draw.choice(nodes)
        match draw.choice(["generate", "generate", "fork", "rewind", "append", "adopt"]):
            case "generate":
                new, tokens = prompt(draw, draw.randrange(1, 40)), draw.randrange(1, 12)
                turn = front.generate(node.branch, new, max_tokens=tokens, sampling=sampling, seed=step)
                assert_same(front, node.ids + new, turn, sampling, step)
                node.ids = node.ids + new + turn.ids
            case "fork" if len(nodes) < 12:
                at = draw.randrange(len(node.ids) + 1) if draw.random() < 0.5 else None
                nodes += [Node(child, node.ids[:at]) for child in front.fork(node.branch, draw.randrange(1, 3), at)]
            case "rewind":
                cut = draw.randrange(len(node.ids) + 1)
                front.rewind(node.branch, cut)
                node.ids = node.ids[:cut]
            case "append":
                new = prompt(draw, draw.randrange(1, 40))
                (child,) = front.fork(node.branch)
                turn = front.generate(child, new, max_tokens=2, sampling=sampling, seed=step)
                assert_same(front, node.ids + new, turn, sampling, step)
                front.adopt(node.branch, child)
                node.ids = node.ids + new + turn.ids
            case _:
                assert front.inspect(node.branch).known == len(node.ids)
    for node in nodes:
        front.end(node.branch)


def test_turns_that_run_together_draw_what_each_draws_alone(front: Front) -> None:
    draw = random.Random(5)
    shared = prompt(draw, 100)
    prompts = [shared + prompt(draw, draw.randrange(1, 60)) for _ in range(6)] + [prompt(draw, 130) for _ in range(3)]
    branches = [front.open() for _ in prompts]
    turns = [
        front.start(branch, ids, max_tokens=20, sampling=HOT, seed=index)
        for index, (branch, ids) in enumerate(zip(branches, prompts, strict=True))
    ]
    front.finish(*turns)
    for index, (ids, turn) in enumerate(zip(prompts, turns, strict=True)):
        assert_same(front, ids, turn, HOT, index)


def test_siblings_share_one_prefill_and_draw_what_each_draws_alone(front: Front) -> None:
    draw = random.Random(6)
    trunk_ids = prompt(draw, 200)
    trunk = front.open(trunk_ids)
    children = front.fork(trunk, 5)
    turns = [
        front.start(child, [index], max_tokens=15, sampling=PENALISED, seed=index)
        for index, child in enumerate(children)
    ]
    front.finish(*turns)
    for index, turn in enumerate(turns):
        assert_same(front, [*trunk_ids, index], turn, PENALISED, index)
    computed = sum(turn.ended.usage.new - turn.ended.usage.shared for turn in turns if turn.ended)
    assert computed <= len(trunk_ids) + len(turns) * (1 + 16), "full pages of the prefix were computed once"


def test_a_live_fork_disturbs_neither_the_turn_nor_the_child(front: Front) -> None:
    draw = random.Random(7)
    ids = prompt(draw, 120)
    branch = front.open(ids)
    turn = front.start(branch, max_tokens=40, sampling=PENALISED, seed=1)
    children: list[tuple[int, int]] = []
    while turn.ended is None:
        front.step()
        if len(children) < 6 and turn.ids and turn.ended is None:
            (child,) = front.fork(branch)
            children.append((child, front.inspect(child).known))
    assert_same(front, ids, turn, PENALISED, 1)
    everything = ids + turn.ids
    assert len({known for _, known in children}) > 1
    for child, known in children:
        again = front.generate(child, [9], max_tokens=6, sampling=PENALISED, seed=2)
        assert_same(front, [*everything[:known], 9], again, PENALISED, 2)


def test_a_cancelled_turn_goes_on_as_if_it_had_been_that_short(front: Front) -> None:
    draw = random.Random(8)
    ids = prompt(draw, 90)
    branch = front.open(ids)
    turn = front.start(branch, max_tokens=500, sampling=PENALISED, seed=1)
    while len(turn.ids) < 7:
        front.step()
    known = front.cancel(branch)
    assert known == len(ids) + len(turn.ids)
    again = front.generate(branch, [3, 4], max_tokens=5, sampling=PENALISED, seed=2)
    assert_same(front, [*ids, *turn.ids, 3, 4], again, PENALISED, 2)


def test_preempted_turns_draw_what_undisturbed_ones_draw(
    checkpoint: Path, pooled: Pooled, front: Front, tmp_path: Path
) -> None:
    draw = random.Random(9)
    prompts = [prompt(draw, 100) for _ in range(5)]
    small = OPTIONS | {"context_limit": 304, "firm_pages": 0}
    with engine(tmp_path, model=str(checkpoint), pages=22, **pooled.options, **small) as process:
        crowded = process.connect()
        branches = [crowded.open() for _ in prompts]
        turns = [
            crowded.start(branch, ids, max_tokens=150, sampling=PENALISED, seed=index)
            for index, (branch, ids) in enumerate(zip(branches, prompts, strict=True))
        ]
        crowded.finish(*turns)
        assert crowded.counts()["preemptions"] > 0
    for index, (ids, turn) in enumerate(zip(prompts, turns, strict=True)):
        assert len(turn.ids) == 150
        assert_same(front, ids, turn, PENALISED, index)
