"""What a script writes for each turn: ids of its text, as far as the turn's grammar and bounds let them come."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from llguidance import LLMatcher
from tokenizers import Tokenizer

from agentspeed.errors import ModelBroken
from agentspeed_engine.exec.stops import StopWatch
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.protocol import messages as wire

_LOG: Final = logging.getLogger("agentspeed.testing")
_NO_LIMIT: Final = 1 << 20
"""Tokens of a context of which the model's folder says nothing."""
CERTAIN: Final = 0.0
_OUT_OF_THE_QUESTION: Final = -40.0
"""Log-probabilities of the id that the script says and of all others: beside it they add up to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedText:
    """What one turn writes; `seconds` pass before each of its tokens."""

    text: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a script may look at: the whole log as text, which turn of the engine this is, and of the session."""

    log: str
    turn: int
    session_turn: int


Script = Callable[[Asked], ScriptedText | None]
"""None: the script has nothing to say to this turn, which is an error of the test."""


@dataclass(slots=True)
class ScriptedBranch:
    """One branch of a link: its log, and the turn that runs on it."""

    session: int
    """Tells the branches of one session from others."""
    parent: int | None
    forked_at: int
    log: list[int]
    computed: int = 0
    turns: int = 0
    running: RunningTurn | None = None


@dataclass(slots=True)
class RunningTurn:
    """A running turn: ids still to be drawn, and how it ends."""

    command: wire.Generate
    left: list[int]
    reason: wire.FinishReason
    message: str
    seconds: float
    usage: wire.TurnUsage
    drawn: int = 0


class ScriptRaised(Exception):
    """The test's own function failed: its turn tells, for nobody sees what a thread raises."""


@final
class ScriptedModel:
    """Asks the script, one turn after the other in the order in which they arrive, from the threads of any links."""

    def __init__(self, folder: Path, script: Script, context_limit: int | None) -> None:
        """`context_limit`: None takes what the model's folder says. Raises `ModelBroken`."""
        self.context_limit = _limit_of(folder) if context_limit is None else context_limit
        self._script = script
        self._tokenizer = _tokenizer(folder)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._vocabulary = Vocabulary(folder, self.vocab_size, ())
        self._asking = threading.Lock()
        self._turns = 0

    def most_likely(self, drawn: int, count: int) -> tuple[wire.TopLogprob, ...]:
        """As the engine gives them: best first, and of those that tie the lowest ids."""
        others = itertools.islice((number for number in itertools.count() if number != drawn), count - 1)
        return (
            wire.TopLogprob(id=drawn, logprob=CERTAIN),
            *(wire.TopLogprob(id=number, logprob=_OUT_OF_THE_QUESTION) for number in others),
        )

    def write(self, branch: ScriptedBranch, command: wire.Generate) -> RunningTurn:
        """What the script writes for this turn, cut where the turn's own bounds cut it."""
        usage = wire.TurnUsage(new=len(branch.log) - branch.computed, resumed_device=branch.computed)
        turn = RunningTurn(
            command=command,
            left=[],
            reason="max_tokens",
            message="",
            seconds=0.0,
            usage=usage,
        )
        if command.max_tokens == 0:
            return turn
        with self._asking:
            self._turns += 1
            branch.turns += 1
            log = self._tokenizer.decode(branch.log, skip_special_tokens=False)
            try:
                said = self._script(Asked(log=log, turn=self._turns, session_turn=branch.turns))
            except ScriptRaised as error:
                _LOG.debug("a script raised", exc_info=error.__cause__)
                turn.reason, turn.message = "error", str(error)
                return turn
        if said is None:
            turn.reason, turn.message = "error", f"the script has no text for turn {self._turns}"
            return turn
        turn.seconds = said.seconds
        turn.left = list(self._tokenizer.encode(said.text, add_special_tokens=False).ids)
        whole = self._fit(turn, branch, said.text)
        self._stop_early(turn, branch)
        if turn.reason == "max_tokens" and whole:
            if not command.stop_ids:
                turn.reason, turn.message = "error", "the turn has no stop id to end with"
            else:
                turn.left.append(command.stop_ids[0])
                turn.reason = "stop_id"
        room = self.context_limit - len(branch.log)
        most = room if command.max_tokens is None else min(room, command.max_tokens)
        if len(turn.left) > most:
            turn.left, turn.reason = turn.left[:most], "max_tokens"
            if most != command.max_tokens:
                turn.message = f"the context limit of {self.context_limit} tokens"
        return turn

    def _fit(self, turn: RunningTurn, branch: ScriptedBranch, text: str) -> bool:
        """Runs the turn's grammar over the text; False when the turn's end is settled already."""
        grammar = turn.command.grammar
        if grammar is None:
            return True
        matcher = LLMatcher(self._vocabulary.llguidance, grammar.source, log_level=0)
        consumed = branch.log[len(branch.log) - grammar.consumed :]
        fitted = matcher.try_consume_tokens([*consumed, *turn.left]) - len(consumed)
        if matcher.is_error() or fitted < len(turn.left):
            fit = self._tokenizer.decode(turn.left[: max(0, fitted)], skip_special_tokens=False)
            turn.reason = "error"
            turn.message = f"the scripted text {text!r} does not fit the turn's grammar after {fit!r}"
            turn.left = turn.left[: max(0, fitted)]
        elif matcher.is_stopped():
            turn.reason = "grammar_end"
        elif not matcher.is_accepting():
            turn.reason = "error"
            turn.message = f"the scripted text {text!r} ends before the turn's grammar does"
        return turn.reason == "max_tokens"

    def _stop_early(self, turn: RunningTurn, branch: ScriptedBranch) -> None:
        begun = branch.log[len(branch.log) - turn.command.stop_consumed :]
        watch = StopWatch(turn.command.stop_strings, b"".join(self._vocabulary.token_bytes[token] for token in begun))
        for number, token in enumerate(turn.left):
            if watch.saw(number, self._vocabulary.token_bytes[token]):
                turn.left, turn.reason, turn.message = turn.left[: number + 1], "stop_string", ""
                return


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelBroken(f"{folder} has no tokenizer.json.", remedy="Give a complete model folder.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise ModelBroken(f"{path} is not a tokenizer: {error}.", remedy="Export it anew.") from error


def _limit_of(folder: Path) -> int:
    """What the model's configuration says, as far as it can be read: a script needs none."""
    try:
        limit = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, LookupError, TypeError):
        return _NO_LIMIT
    return limit if isinstance(limit, int) and limit > 0 else _NO_LIMIT
