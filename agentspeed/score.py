"""How likely a model finds a given text: its log-probabilities at a branch, where nothing is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from agentspeed import errors
from agentspeed._base.validate import check_ids, check_text
from agentspeed._base.wording import counted
from agentspeed._core.options import build_request
from agentspeed._core.session_core import SessionCore
from agentspeed.fork import fork
from agentspeed.messages import Message
from agentspeed.tools.grammars import HEAD
from agentspeed.turn import Turn
from agentspeed.usage import Usage


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely one text is as the beginning of the model's message, or as the continuation of its open one."""

    ids: tuple[int, ...]
    """The ids of the text, as the tokenizer writes it; the end of the message is not among them."""
    logprobs: tuple[float, ...]
    """Natural logarithms of the model's own distribution, one for each id."""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """For each id, the most likely ones at its place, if they were asked for."""
    usage: Usage = field(default_factory=Usage)
    """What it has cost, one step for each id; the session's own usage does not count it."""

    @property
    def total(self) -> float:
        """The logarithm of the probability of the whole text, written with these ids."""
        return sum(self.logprobs)


async def score(core: SessionCore, text: str | Sequence[int], after: tuple[Message, ...], top: int) -> Score:
    """See `Session.score`."""
    if text == "":
        raise errors.InvalidRequest("text is empty; there is nothing to score.")
    if isinstance(text, str):
        check_text("text", text)
        core.must_be_idle()
        ids = tuple(core.codec.tokenizer.content_ids(text))
    else:
        ids = check_ids("text", text)
        core.must_be_idle()
    opened = core.log.open_at
    said = [] if after or opened is None else core.log.ids[opened:]
    (child,) = await fork(core, 1, None)
    try:
        request = build_request(
            after or None,
            str,
            {"logprobs": top, "max_tokens": len(ids), "tool_choice": "none"},
            child.defaults,
            child.tags_for(after),
        )
        # The engine is allowed these very ids, one after the other: log-probabilities are from before the grammar.
        grammar = f"{HEAD}\nstart: {' '.join(f'<[{number}]>' for number in (*said, *ids))}"
        async with Turn[Any](child, replace(request, grammar=grammar, ends=False)) as turn:
            reply = await turn.reply()
    finally:
        await child.close()
    if reply.ids != ids:
        raise errors.ContextOverflow(
            f"The text has {counted(len(ids), 'token')}, and {reply.bound or 'the engine'} left room for "
            f"{len(reply.ids)}.",
            remedy="Score a shorter text, or compact the session.",
        )
    return Score(ids=ids, logprobs=reply.logprobs, top=reply.top_logprobs, usage=reply.usage)
