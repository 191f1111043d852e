"""Grammars, stop strings and stop ids through a real engine with a real (random) model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from llguidance import LLMatcher

from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.protocol import messages as wire
from tests.support.engine_client import Front, TurnRecord, engine
from tests.support.random_checkpoint import make_checkpoint

CONFIG = Path(__file__).parents[2] / "bench/models/tiny.json"
OPTIONS = {"dtype": "float64", "page_tokens": 16, "context_limit": 512, "threads": 1, "check_every_step": True}
END = 257
HOT = wire.Sampling(temperature=1.5)
DIGITS = wire.Grammar(source=LLMatcher.grammar_from_regex("[0-9]{40}"))
BOOLEAN = wire.Grammar(
    source=LLMatcher.grammar_from_json_schema(
        {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
        {"whitespace_flexible": False},
    )
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(json.loads(CONFIG.read_text()), tmp_path_factory.mktemp("tiny"), seed=4, dtype="float64")


@pytest.fixture(scope="module")
def front(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with engine(tmp_path_factory.mktemp("engine"), model=str(checkpoint), pages=300, **OPTIONS) as process:
        yield process.connect()


@pytest.fixture(scope="module")
def table(checkpoint: Path) -> list[bytes]:
    return Vocabulary(checkpoint, 512, (END,)).token_bytes


def text(table: list[bytes], ids: list[int]) -> bytes:
    return b"".join(table[number] for number in ids)


def reason(turn: TurnRecord) -> str:
    assert turn.ended is not None
    return turn.ended.reason


@pytest.mark.parametrize("seed", range(3))
def test_a_grammar_holds_over_a_whole_turn_and_ends_it(front: Front, table: list[bytes], seed: int) -> None:
    turn = front.generate(front.open([1, 2, 3]), sampling=HOT, seed=seed, grammar=DIGITS, stop_ids=(END,))
    assert reason(turn) == "grammar_end"
    assert re.fullmatch(rb"[0-9]{40}", text(table, turn.ids))


def test_a_schema_gives_a_value_of_it(front: Front, table: list[bytes]) -> None:
    turn = front.generate(front.open([9]), sampling=HOT, seed=1, grammar=BOOLEAN, stop_ids=(END,))
    assert isinstance(json.loads(text(table, turn.ids))["ok"], bool)


def test_turns_with_and_without_a_grammar_share_steps(front: Front, table: list[bytes]) -> None:
    turns = [
        front.start(
            front.open([number]), sampling=HOT, seed=number, max_tokens=30, grammar=DIGITS if number % 2 else None
        )
        for number in range(6)
    ]
    front.finish(*turns)
    assert all(text(table, turn.ids).isdigit() for turn in turns[1::2])
    assert not any(text(table, turn.ids).isdigit() for turn in turns[0::2])


@pytest.mark.parametrize("source", ["", "no grammar", '{"grammars": [{"json_schema": {"type": "nonsense"}}]}'])
def test_a_grammar_that_does_not_compile_ends_its_turn_and_nothing_else(front: Front, source: str) -> None:
    branch = front.open([5])
    turn = front.generate(branch, max_tokens=5, grammar=wire.Grammar(source=source))
    assert reason(turn) == "error"
    assert turn.ended is not None and turn.ended.message
    assert len(front.generate(branch, max_tokens=5).ids) == 5, "the session goes on"


def test_a_turn_with_a_grammar_goes_on_after_a_live_fork_and_so_does_the_child(
    front: Front, table: list[bytes]
) -> None:
    undisturbed = front.generate(front.open([7, 7], private=True), sampling=HOT, seed=3, grammar=DIGITS)
    branch = front.open([7, 7])
    turn = front.start(branch, sampling=HOT, seed=3, grammar=DIGITS)
    children: list[tuple[int, int]] = []
    while turn.ended is None:
        front.step()
        if len(children) < 5 and turn.ids and turn.ended is None:
            (child,) = front.fork(branch)
            children.append((child, front.inspect(child).known - 2))
    assert turn.ids == undisturbed.ids
    assert len(children) == 5
    for child, drawn in children:
        rest = front.generate(child, sampling=HOT, seed=4, grammar=wire.Grammar(source=DIGITS.source, consumed=drawn))
        assert re.fullmatch(rb"[0-9]{40}", text(table, undisturbed.ids[:drawn] + rest.ids))


def test_preempted_turns_keep_their_grammars_and_stop_strings(
    checkpoint: Path, front: Front, table: list[bytes], tmp_path: Path
) -> None:
    draw = random.Random(2)
    prompts = [[draw.randrange(512) for _ in range(60)] for _ in range(5)]
    options = {
        "sampling": HOT,
        "grammar": wire.Grammar(source=LLMatcher.grammar_from_regex("[0-9]{150}")),
        "stop_strings": (b"77",),
    }
    small = OPTIONS | {"context_limit": 240, "firm_pages": 0}
    with engine(tmp_path, model=str(checkpoint), pages=17, **small) as process:
        crowded = process.connect()
        turns = [crowded.start(crowded.open(), ids, seed=number, **options) for number, ids in enumerate(prompts)]
        crowded.finish(*turns)
        assert crowded.counts()["preemptions"] > 0
    for number, (ids, turn) in enumerate(zip(prompts, turns, strict=True)):
        alone = front.generate(front.open(private=True), ids, seed=number, **options)
        assert (turn.ids, reason(turn)) == (alone.ids, reason(alone))
        assert (b"77" in text(table, turn.ids)) == (reason(turn) == "stop_string")


def test_a_stop_string_ends_a_turn_with_the_token_that_completes_it(front: Front, table: list[bytes]) -> None:
    free = front.generate(front.open([3], private=True), max_tokens=60, sampling=HOT, seed=8)
    whole = text(table, free.ids)
    stop = whole[40:43]
    turn = front.generate(front.open([3]), max_tokens=60, sampling=HOT, seed=8, stop_strings=(b"\0never\0", stop))
    assert reason(turn) == "stop_string"
    assert turn.ids == free.ids[: len(turn.ids)]
    assert stop in text(table, turn.ids)
    assert stop not in text(table, turn.ids[:-1])


def test_a_stop_id_ends_a_turn_and_stays_in_the_log(front: Front) -> None:
    free = front.generate(front.open([3], private=True), max_tokens=40, sampling=HOT, seed=9)
    stop = free.ids[20]
    turn = front.generate(branch := front.open([3]), max_tokens=40, sampling=HOT, seed=9, stop_ids=(stop,))
    assert reason(turn) == "stop_id"
    assert turn.ids == free.ids[: free.ids.index(stop) + 1]
    assert front.inspect(branch).known == 1 + len(turn.ids)
