"""Grammars are compiled beside the steps: a turn that needs one waits alone."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.grammar import Matchers
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.serve.loop import EngineLoop
from agentspeed_engine.serve.options import EngineOptions, build
from tests.support.engine_client import Front
from tests.support.random_checkpoint import byte_tokenizer

SIZE, END = 512, 257
DIGITS = wire.Grammar(source=LLMatcher.grammar_from_regex("[0-9]{3}"))
LETTERS = wire.Grammar(source=LLMatcher.grammar_from_regex("[a-z]{3}"))


class Held:
    """Holds back the compilation of one grammar until it is let go, or says that it broke."""

    def __init__(self, grammar: wire.Grammar) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.threads: list[str] = []
        self.breaks = False
        self._grammar = grammar
        self._honest = Matchers.prepare

    def prepare(self, matchers: Matchers, spec: TurnSpec, grammar: wire.Grammar) -> None:
        self.threads.append(threading.current_thread().name)
        if grammar == self._grammar:
            self.begun.set()
            assert self.may_end.wait(10)
            if self.breaks:
                raise ZeroDivisionError("planted")
        self._honest(matchers, spec, grammar)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    one = Held(DIGITS)
    monkeypatch.setattr(Matchers, "prepare", lambda *arguments: one.prepare(*arguments))
    yield one
    one.may_end.set()


@contextmanager
def engine(folder: Path) -> Iterator[tuple[CpuExecutor, Front, list[BaseException]]]:
    byte_tokenizer(SIZE).save(str(folder / "tokenizer.json"))
    made = build(EngineOptions(model=f"noop:{SIZE}:0", pages=40, page_tokens=16, context_limit=256))
    executor = CpuExecutor(made.model, Vocabulary(folder, SIZE, (END,)))
    loop = EngineLoop(made, check=True, executor=executor)
    broke: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except ZeroDivisionError as error:
            broke.append(error)

    thread = threading.Thread(target=run)
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    loop.connect(theirs)
    thread.start()
    try:
        with ours:
            yield executor, Front(ours), broke
    finally:
        loop.stop()
        thread.join(10)


def constrained(front: Front, branch: int, grammar: wire.Grammar) -> Any:
    return front.start(branch, max_tokens=8, grammar=grammar, stop_ids=(END,), sampling=wire.Sampling(temperature=0.0))


def test_a_grammar_that_takes_long_keeps_nobody_else_waiting(tmp_path: Path, held: Held) -> None:
    with engine(tmp_path) as (_, front, _):
        slow, plain, other = front.open([5]), front.open([1, 2]), front.open([7])
        turn = constrained(front, slow, DIGITS)
        assert held.begun.wait(10)
        assert front.generate(plain, max_tokens=40).ids == list(range(3, 43))
        quick = constrained(front, other, LETTERS)
        while not quick.ended:
            front.step()
        assert quick.ended.reason == "grammar_end" and not turn.ended
        held.may_end.set()
        while not turn.ended:
            front.step()
        assert (turn.ended.reason, len(turn.ids)) == ("grammar_end", 3)
    assert all(name.startswith("agentspeed-prepare") for name in held.threads) and len(held.threads) == 2


def test_a_turn_that_is_cancelled_meanwhile_leaves_nothing_behind(tmp_path: Path, held: Held) -> None:
    with engine(tmp_path) as (executor, front, _):
        branch = front.open([5])
        turn = constrained(front, branch, DIGITS)
        assert held.begun.wait(10)
        _ = front.ask(wire.Cancel(request=front.number(), branch=branch), wire.Done)
        assert turn.ended and turn.ended.reason == "cancelled"
        held.may_end.set()
        assert front.generate(branch, [8], max_tokens=2).ids == [9, 10]
        again = constrained(front, branch, LETTERS)
        while not again.ended:
            front.step()
        assert front.generate(branch, [8], max_tokens=1).ids == [9]  # its step tells the executor who has ended
        assert executor.turns == frozenset()


def test_a_grammar_that_does_not_compile_ends_its_turn_before_a_step_is_spent_on_it(tmp_path: Path) -> None:
    with engine(tmp_path) as (_, front, _):
        branch = front.open([5])
        turn = constrained(front, branch, wire.Grammar(source="no such grammar"))
        while not turn.ended:
            front.step()
        assert turn.ended.reason == "error" and turn.ended.message
        assert front.counts()["steps"] == 0


def test_a_bug_in_a_preparation_stops_the_engine_and_is_raised(tmp_path: Path, held: Held) -> None:
    held.breaks = True
    with engine(tmp_path) as (_, front, broke):
        _ = constrained(front, front.open([5]), DIGITS)
        held.may_end.set()
        for thread in threading.enumerate():
            if thread.name.startswith("Thread") and thread is not threading.main_thread():
                thread.join(10)
        assert [type(error) for error in broke] == [ZeroDivisionError]


def test_a_vocabulary_is_made_ready_while_a_model_loads() -> None:
    nano = Path(__file__).parents[4] / "agentspeed" / "models" / "nano"
    made = build(EngineOptions(model=str(nano), pages=8))
    assert {"token_bytes", "llguidance"} <= vars(made.vocabulary).keys()


def test_an_engine_whose_tokenizer_is_broken_starts_and_says_what_it_will_refuse(tmp_path: Path) -> None:
    nano = Path(__file__).parents[4] / "agentspeed" / "models" / "nano"
    for name in os.listdir(nano):
        if name != "tokenizer.json":
            (tmp_path / name).symlink_to(nano / name)
    _ = (tmp_path / "tokenizer.json").write_text("{}")
    said: list[str] = []
    made = build(EngineOptions(model=str(tmp_path), pages=8), said.append)
    (refusal,) = (line for line in said if "stop strings or a grammar will be refused" in line)
    assert "is not a tokenizer" in refusal and made.core.pages == 8
