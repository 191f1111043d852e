"""Grammar matchers of running turns, one per turn: a mask before each draw, one id consumed after it."""

from __future__ import annotations

from typing import final

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from agentspeed_engine.kv.runs import TurnSpec
from agentspeed_engine.run.vocabulary import Vocabulary


class GrammarRefused(Exception):
    """The grammar does not compile or has come to a dead end: the turn ends with this reason, the engine goes on."""


@final
class Matchers:
    """llguidance matchers by turn."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._by_turn: dict[int, LLMatcher] = {}

    def allowed(self, spec: TurnSpec) -> NDArray[np.bool_] | None:
        """[vocab] of the ids that may follow; None for a turn without a grammar. Raises `GrammarRefused`."""
        if spec.grammar is None:
            return None
        matcher = self._matcher(spec)
        size = self._vocabulary.vocab_size
        if matcher.is_stopped():
            allowed = np.zeros(size, dtype=np.bool_)
        else:
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            self._refuse_error(matcher)
            allowed = np.unpackbits(bits, bitorder="little")[:size].astype(np.bool_)
        if not allowed.any():
            allowed[[number for number in (*self._vocabulary.eos_ids, *spec.stop_ids) if number < size]] = True
        elif matcher.is_accepting():  # it may end here: let the turn's own stop ids say so too
            allowed[[number for number in spec.stop_ids if number < size]] = True
        if not allowed.any():
            raise GrammarRefused("the grammar allows no token and the turn has no stop id to end with")
        return allowed

    def consume(self, spec: TurnSpec, token: int) -> bool:
        """True when the grammar is complete with `token`: nothing may follow but the end."""
        if spec.grammar is None:
            return False
        matcher = self._matcher(spec)
        if token in spec.stop_ids or token in self._vocabulary.eos_ids:
            return True
        if not matcher.consume_token(token):
            self._refuse_error(matcher)
            raise GrammarRefused(f"the grammar does not accept id {token}")
        return bool(matcher.is_stopped())

    def forget(self, turns: tuple[int, ...]) -> None:
        for turn in turns:
            self._by_turn.pop(turn, None)

    def _matcher(self, spec: TurnSpec) -> LLMatcher:
        matcher = self._by_turn.get(spec.turn)
        if matcher is None:
            assert spec.grammar is not None
            matcher = LLMatcher(self._vocabulary.llguidance, spec.grammar.source, log_level=0)
            self._refuse_error(matcher)
            if spec.consumed_ids and not matcher.consume_tokens(list(spec.consumed_ids)):
                self._refuse_error(matcher)
                raise GrammarRefused("the ids of the open message do not fit the grammar it is continued with")
            self._by_turn[spec.turn] = matcher
        return matcher

    @staticmethod
    def _refuse_error(matcher: LLMatcher) -> None:
        error = matcher.get_error()
        if error:
            raise GrammarRefused(error)
