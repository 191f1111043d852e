"""Grammar matchers of running turns, one per turn: a mask before each draw, one id consumed after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import Grammar


class GrammarRefused(Exception):
    """The grammar does not compile or has come to a dead end: the turn ends with this reason, the engine goes on."""


@final
@dataclass(slots=True)
class _Progress:
    matcher: LLMatcher
    consumed: int = 0
    """Ids of the turn the matcher has seen; its first `consumed_ids` are not among them."""


@final
class Matchers:
    """llguidance matchers by turn."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._by_turn: dict[int, _Progress] = {}

    def prepare(self, spec: TurnSpec, grammar: Grammar) -> None:
        """Compiles the turn's grammar, in the calling thread. Raises `GrammarRefused`, and `EngineFault` when the
        vocabulary cannot be read."""
        self._by_turn[spec.turn] = _Progress(self._compiled(spec, grammar))

    def allowed(self, spec: TurnSpec, grammar: Grammar, drawn: int) -> NDArray[np.bool_]:
        """[vocab] of the ids that may follow the turn's first `drawn` ids. Raises `GrammarRefused`."""
        matcher = self._at(spec, grammar, drawn).matcher
        size = self._vocabulary.vocab_size
        if matcher.is_stopped():
            allowed = np.zeros(size, dtype=np.bool_)
        else:
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            _refuse_error(matcher)
            allowed = np.unpackbits(bits, bitorder="little")[:size].astype(np.bool_)
        ends = [number for number in spec.stop_ids if number < size]
        if not allowed.any():
            allowed[[*ends, *self._vocabulary.eos_ids]] = True
        elif matcher.is_accepting():  # it may end here: the turn's own stop ids may say so too
            allowed[ends] = True
        if not allowed.any():
            raise GrammarRefused("the grammar allows no token here and the turn has no stop id to end with")
        return allowed

    def consume(self, spec: TurnSpec, token: int) -> bool:
        """True when the grammar is complete with `token`: nothing may follow but the end. Call `allowed` first."""
        progress = self._by_turn[spec.turn]
        matcher, end = progress.matcher, token in self._vocabulary.eos_ids
        if token in spec.stop_ids or (end and (matcher.is_stopped() or matcher.is_accepting())):
            return True
        if not matcher.consume_token(token):  # an end that the grammar itself names is an id as others are
            if end:
                return True
            _refuse_error(matcher)
            raise GrammarRefused(f"the grammar does not accept id {token}")
        progress.consumed += 1
        return bool(matcher.is_stopped())

    @property
    def turns(self) -> set[int]:
        """The turns that have a matcher."""
        return set(self._by_turn)

    def forget(self, turns: tuple[int, ...]) -> None:
        for turn in turns:
            self._by_turn.pop(turn, None)

    def _at(self, spec: TurnSpec, grammar: Grammar, drawn: int) -> _Progress:
        progress = self._by_turn.get(spec.turn)
        if progress is None:
            progress = self._by_turn[spec.turn] = _Progress(self._compiled(spec, grammar))
        ahead = progress.consumed - drawn
        if ahead > 0:  # a draw the core did not take: a live fork or a preemption put the turn back by one step
            if not progress.matcher.rollback(ahead):
                raise GrammarRefused(f"the grammar cannot go back {ahead} ids")
            progress.consumed = drawn
        return progress

    def _compiled(self, spec: TurnSpec, grammar: Grammar) -> LLMatcher:
        try:
            matcher = LLMatcher(self._vocabulary.llguidance, grammar.source, log_level=0)
        except ValueError as error:
            raise GrammarRefused(str(error)) from error
        _refuse_error(matcher)
        if spec.consumed_ids and not matcher.consume_tokens(list(spec.consumed_ids)):
            _refuse_error(matcher)
            raise GrammarRefused("the ids of the open message do not fit the grammar it is continued with")
        return matcher


def _refuse_error(matcher: LLMatcher) -> None:
    error = matcher.get_error()
    if error:
        raise GrammarRefused(error)
