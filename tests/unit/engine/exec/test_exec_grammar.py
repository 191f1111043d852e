"""Grammars and stop strings in the worker: masks, ends, dead ends, draws that are drawn again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.grammar import GrammarRefused, Matchers
from agentspeed_engine.exec.noop import NoopModel
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.exec.worker import Worker
from agentspeed_engine.ids import BranchId, PageId, StepSeq
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import Grammar, Sampling
from agentspeed_engine.sched.plan import Row, StepPlan, StepResult
from tests.support.random_checkpoint import byte_tokenizer

SIZE, END = 512, 257
DIGITS = LLMatcher.grammar_from_regex("[0-9]{3}")
DIGITS_GRAMMAR = Grammar(source=DIGITS)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(SIZE).save(str(folder / "tokenizer.json"))
    return Vocabulary(folder, SIZE, (END,))


def turn(
    grammar: str | None = DIGITS,
    *,
    number: int = 1,
    consumed: tuple[int, ...] = (),
    prompt: int = 1,
    stop_strings: tuple[bytes, ...] = (),
    temperature: float = 1.0,
) -> TurnSpec:
    return TurnSpec(
        turn=number,
        branch=BranchId(1),
        sampling=Sampling(temperature=temperature),
        draw_key=(0, 0, 0),
        stop_strings=stop_strings,
        grammar=None if grammar is None else Grammar(source=grammar),
        consumed_ids=consumed,
        prompt_tokens=prompt,
        stop_ids=frozenset({END}),
    )


def allowed(matchers: Matchers, spec: TurnSpec, drawn: int) -> set[int]:
    assert spec.grammar is not None
    return set(np.flatnonzero(matchers.allowed(spec, spec.grammar, drawn)).tolist())


def ids_of(vocabulary: Vocabulary, text: str) -> list[int]:
    return [vocabulary.token_bytes.index(char.encode()) for char in text]


def test_only_what_the_grammar_allows_can_be_drawn(vocabulary: Vocabulary) -> None:
    matchers, spec = Matchers(vocabulary), turn()
    for number in allowed(matchers, spec, 0):
        assert vocabulary.token_bytes[number].isdigit()
    for index, number in enumerate(ids_of(vocabulary, "123")):
        assert number in allowed(matchers, spec, index)
        assert matchers.consume(spec, number) == (index == 2), "the grammar ends with the third digit"
    assert allowed(matchers, spec, 3) == {END}


def test_a_draw_that_was_not_taken_is_taken_back(vocabulary: Vocabulary) -> None:
    matchers, spec = Matchers(vocabulary), turn(LLMatcher.grammar_from_regex("ab|cd"))
    a, b, c = ids_of(vocabulary, "abc")
    assert {a, c} <= allowed(matchers, spec, 0)
    assert not matchers.consume(spec, a)
    assert {a, c} <= allowed(matchers, spec, 0), "drawn again in the same place"
    assert not matchers.consume(spec, a)
    assert b in allowed(matchers, spec, 1)
    assert matchers.consume(spec, b), "complete"
    assert b in allowed(matchers, spec, 1), "back from the end of the grammar as well"


def test_a_turn_continued_after_a_live_fork_first_consumes_the_open_message(vocabulary: Vocabulary) -> None:
    matchers = Matchers(vocabulary)
    spec = turn(consumed=tuple(ids_of(vocabulary, "12")), prompt=3)
    allowed(matchers, spec, 0)
    assert matchers.consume(spec, ids_of(vocabulary, "3")[0])
    wrong = turn(number=2, consumed=tuple(ids_of(vocabulary, "x")))
    with pytest.raises(GrammarRefused):
        allowed(matchers, wrong, 0)


@pytest.mark.parametrize("source", ["", "{", "no such grammar", '{"grammars": [{"lark_grammar": "start: ("}]}'])
def test_a_grammar_that_does_not_compile_is_refused_with_its_reason(vocabulary: Vocabulary, source: str) -> None:
    matchers, spec = Matchers(vocabulary), turn(source)
    with pytest.raises(GrammarRefused) as refused:
        allowed(matchers, spec, 0)
    assert str(refused.value)
    assert allowed(matchers, turn(number=2), 0), "others go on"


def test_a_json_schema_ends_when_the_value_is_complete(vocabulary: Vocabulary) -> None:
    source = LLMatcher.grammar_from_json_schema({"type": "boolean"}, {"whitespace_flexible": False})
    matchers, spec = Matchers(vocabulary), turn(source)
    ends = []
    for index, number in enumerate(ids_of(vocabulary, "true")):
        assert number in allowed(matchers, spec, index)
        ends.append(matchers.consume(spec, number))
    assert ends == [False, False, False, True]


def test_ended_turns_are_forgotten(vocabulary: Vocabulary) -> None:
    matchers, spec = Matchers(vocabulary), turn()
    allowed(matchers, spec, 0)
    matchers.consume(spec, ids_of(vocabulary, "1")[0])
    matchers.forget((spec.turn,))
    assert len(allowed(matchers, spec, 0)) > 1
    assert not matchers.consume(spec, ids_of(vocabulary, "1")[0])


# ---- through the worker -------------------------------------------------------------------------------------------
def step(worker: Worker, spec: TurnSpec, position: int, token: int = 5) -> StepResult:
    row = Row(
        branch=BranchId(1),
        epoch=1,
        position=position,
        ids=(token,),
        path=(),
        tail_start=0,
        tail_pages=(PageId(0),),
        sample=spec,
    )
    return worker.execute(StepPlan(StepSeq(position), (row,)))


def test_the_worker_ends_a_turn_with_its_grammar(vocabulary: Vocabulary) -> None:
    worker, spec = Worker(CpuExecutor(NoopModel(SIZE, 0.0, 64), vocabulary)), turn()
    ends = [step(worker, spec, position).drawn[0] for position in range(3)]
    assert [drawn.end for drawn in ends] == [None, None, "grammar_end"]
    assert b"".join(vocabulary.token_bytes[drawn.id] for drawn in ends).isdigit()


def test_the_worker_ends_a_turn_with_a_stop_string(vocabulary: Vocabulary) -> None:
    spec = turn(None, stop_strings=(b"cd",), temperature=0.0)
    worker = Worker(CpuExecutor(NoopModel(SIZE, 0.0, 64), vocabulary))
    b, c = ids_of(vocabulary, "bc")
    (first,), (second,) = step(worker, spec, 0, b).drawn, step(worker, spec, 1, c).drawn
    assert (first.id, first.end) == (c, None)
    assert second.end == "stop_string"


def test_a_turn_the_worker_cannot_serve_is_refused_and_the_others_are_served(tmp_path: Path) -> None:
    vocabulary = Vocabulary(tmp_path, SIZE, ())
    (tmp_path / "tokenizer.json").write_text(json.dumps({"not": "a tokenizer"}))
    worker = Worker(CpuExecutor(NoopModel(SIZE, 0.0, 64), vocabulary))
    broken = Row(
        branch=BranchId(1), epoch=4, position=0, ids=(5,), path=(), tail_start=0, tail_pages=(PageId(0),), sample=turn()
    )
    sound = Row(
        branch=BranchId(2),
        epoch=1,
        position=0,
        ids=(8,),
        path=(),
        tail_start=0,
        tail_pages=(PageId(1),),
        sample=turn(None, number=2, temperature=0.0),
    )
    result = worker.execute(StepPlan(StepSeq(1), (broken, sound)))
    assert [(branch, epoch) for branch, epoch, _ in result.refused] == [(1, 4)]
    assert "not a tokenizer" in result.refused[0][2]
    assert [(drawn.branch, drawn.id) for drawn in result.drawn] == [(2, 9)]


def test_a_step_without_sampling_rows_draws_nothing(vocabulary: Vocabulary) -> None:
    row = Row(
        branch=BranchId(1), epoch=1, position=0, ids=(5, 6), path=(), tail_start=0, tail_pages=(PageId(0),), sample=None
    )
    assert Worker(CpuExecutor(NoopModel(SIZE, 0.0, 64), vocabulary)).execute(StepPlan(StepSeq(1), (row,))).drawn == ()


# ---- bytes of a vocabulary ----------------------------------------------------------------------------------------
def test_byte_level_pieces_become_the_bytes_they_stand_for(vocabulary: Vocabulary) -> None:
    table = vocabulary.token_bytes
    assert len(table) == SIZE
    for byte in range(256):
        assert bytes([byte]) in table
    assert table[END] == b"<|end|>"


def test_byte_fallback_pieces_become_their_byte(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        models.BPE(
            vocab={"<unk>": 0, "<0x0A>": 1, "\u2581hi": 2, "é": 3}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Vocabulary(tmp_path, 5, ()).token_bytes == [b"<unk>", b"\n", b" hi", "é".encode(), b""]


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match=r"tokenizer\.json"):
        _ = Vocabulary(tmp_path, 5, ()).token_bytes


@pytest.mark.parametrize("extra", [1, 40])
def test_a_tokenizer_with_more_ids_than_the_model_draws_from_masks_those_it_draws_from(
    tmp_path: Path, extra: int
) -> None:
    """As those with ids for images: a model's vocabulary ends before them."""
    tokenizer = byte_tokenizer(SIZE)
    tokenizer.add_special_tokens([f"<|image {number}|>" for number in range(extra)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    larger = Vocabulary(tmp_path, SIZE, (END,))
    assert len(larger.token_bytes) == SIZE
    matchers, spec = Matchers(larger), turn()
    for index, number in enumerate(ids_of(larger, "123")):
        mask = matchers.allowed(spec, DIGITS_GRAMMAR, index)
        assert mask.shape == (SIZE,)
        assert all(larger.token_bytes[found].isdigit() for found in np.flatnonzero(mask))
        matchers.consume(spec, number)
    assert allowed(matchers, spec, 3) == {END}


def test_a_grammar_that_could_go_on_with_an_id_beyond_the_vocabulary_alone_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(SIZE)
    tokenizer.add_special_tokens(["<|image|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    matchers = Matchers(Vocabulary(tmp_path, SIZE, ()))
    spec = turn(LLMatcher.grammar_from_lark("start: <|image|>"))
    spec = replace(spec, stop_ids=frozenset())
    assert spec.grammar is not None
    with pytest.raises(GrammarRefused, match="allows no token"):
        matchers.allowed(spec, spec.grammar, 0)
