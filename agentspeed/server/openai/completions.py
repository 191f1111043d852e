"""`POST /v1/completions`: plain texts that the model goes on with, and the log-probabilities of given ones."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, final

import anyio
import msgspec

from agentspeed import errors, events
from agentspeed.server.finish_reasons import FINISH
from agentspeed.server.openai.parameters import bounded_tokens, sampling_of, stops_of
from agentspeed.server.problems import refused
from agentspeed.server.streaming import Emitter, encoded
from agentspeed.server.texts import TokenId
from agentspeed.server.turns import Service
from agentspeed.session import Session, TurnOptions
from agentspeed.turn import Reply
from agentspeed.usage import Usage

MOST_TEXTS: Final = 128
"""Prompts times choices of one request."""
_DEFAULT_TOKENS: Final = 16
"""This endpoint's own default of max_tokens."""


class CompletionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body. The last group is taken and means nothing here."""

    prompt: str | list[str | TokenId | list[TokenId]]
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    logprobs: int | None = None
    echo: bool = False
    stop: Any = None
    seed: int | None = None
    best_of: int | None = None
    suffix: str | None = None

    user: str | None = None


@final
@dataclass(slots=True)
class _Told:
    """Of one choice: what its log-probabilities are of, in order."""

    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    length: int = 0

    def add(self, text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        self.tokens.append(text)
        self.logprobs.append(logprob)
        self.top.append(top)
        self.offsets.append(self.length)
        self.length += len(text)

    def body(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        }


@final
class Completion:
    """One request, checked."""

    def __init__(self, body: CompletionRequest, service: Service, tenant: str) -> None:
        """Raises `RequestProblem`."""
        self._body = body
        self._service = service
        self._tenant = tenant
        self._choices = 1 if body.n is None else body.n
        self._prompts = _prompts(body.prompt)
        if self._choices < 1 or len(self._prompts) * self._choices > MOST_TEXTS:
            raise refused(f"n times the prompts must be from 1 to {MOST_TEXTS}.", param="n")
        if body.best_of not in (None, self._choices):
            raise refused("best_of is not supported; ask for n and choose.", param="best_of", code="unsupported")
        if body.suffix:
            raise refused("suffix is not supported; this model writes forwards.", param="suffix", code="unsupported")
        limits = service.options
        self._nothing_new = body.max_tokens == 0
        if self._nothing_new and not body.echo:
            raise refused("max_tokens is 0 and echo is not asked for: nothing would come.", param="max_tokens")
        asked = None if self._nothing_new else body.max_tokens
        self._options: TurnOptions = {
            "sampling": sampling_of(body),
            "stop": stops_of(body.stop),
            **bounded_tokens(asked, _DEFAULT_TOKENS, limits.max_tokens, "max_tokens"),
        }
        if body.logprobs is not None:
            self._options["logprobs"] = body.logprobs
        self._with_usage = bool((body.stream_options or {}).get("include_usage"))
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }
        self._usage = Usage()
        self._prompt_tokens = 0

    async def complete(self) -> dict[str, Any]:
        """The whole answer as one body."""
        choices: dict[int, dict[str, Any]] = {}
        async with self._service.admitted():
            await self._all(None, choices)
        return {**self._head, "choices": [choices[index] for index in sorted(choices)], "usage": self._usage_body()}

    async def produce(self, emit: Emitter) -> None:
        """To be given to `EventStream`."""
        async with self._service.admitted():
            await self._all(emit, {})
        if self._with_usage:
            await self._emit(emit, [], self._usage_body())
        await emit.raw(b"data: [DONE]\n\n")

    async def _all(self, emit: Emitter | None, choices: dict[int, dict[str, Any]]) -> None:
        """Raises `TurnTimeout`: all prompts, their scores and their choices have the time of one turn."""
        seconds = self._service.options.turn_seconds
        with anyio.move_on_after(seconds) as scope:
            for place, prompt in enumerate(self._prompts):
                await self._prompt(place * self._choices, prompt, emit, choices)
        if scope.cancelled_caught:
            raise errors.TurnTimeout(
                f"The request took longer than {seconds} s and was cancelled.",
                remedy="Ask for fewer tokens, prompts or choices at once.",
            )

    async def _prompt(
        self, first: int, prompt: str | list[int], emit: Emitter | None, choices: dict[int, dict[str, Any]]
    ) -> None:
        tokenizer = self._service.engine.codec.tokenizer
        ids = prompt if isinstance(prompt, list) else await anyio.to_thread.run_sync(tokenizer.content_ids, prompt)
        start = [] if isinstance(prompt, list) else list(tokenizer.start_ids)
        scored = self._body.echo and self._body.logprobs is not None
        # Whose log-probabilities are asked for is scored first: what stands before the first of them has none.
        known = (start or ids[:1]) if scored else [*start, *ids]
        if not known:
            raise refused("prompt is empty, and this model has no token that begins a text.", param="prompt")
        async with Session.over_text(known, self._service.engine, tenant=self._tenant or None) as session:
            before = _Told()
            if self._body.echo and not scored:
                before.length = len(tokenizer.text(ids))
            full = [*start, *ids]
            if scored:
                await self._score(session, ids[0 if start else 1 :], ids, bool(start), before)
            self._prompt_tokens += len(full)
            if scored and len(full) > len(known):
                async with Session.over_text(full, self._service.engine, tenant=self._tenant or None) as whole:
                    await self._continue(whole, first, ids, before, emit, choices)
            else:
                await self._continue(session, first, ids, before, emit, choices)

    async def _score(self, session: Session, rest: list[int], ids: list[int], begun: bool, told: _Told) -> None:
        tokenizer = self._service.engine.codec.tokenizer
        if not begun:
            told.add(tokenizer.text(ids[:1]), None, None)
        if rest:
            found = await session.score(rest, top=self._body.logprobs or 0)
            self._service.metrics.scored(found.usage, _seconds(found.usage))
            self._tell(told, found.ids, found.logprobs, found.top)

    def _tell_drawn(self, told: _Told, reply: Reply[Any]) -> None:
        """Of all but the id that ended the text."""
        kept = [place for place, number in enumerate(reply.ids) if number not in self._service.engine.codec.stop_ids]
        tops = [reply.top_logprobs[place] for place in kept] if reply.top_logprobs else None
        self._tell(told, [reply.ids[place] for place in kept], [reply.logprobs[place] for place in kept], tops)

    def _tell(self, told: _Told, ids: Any, logprobs: Any, tops: Any) -> None:
        tokenizer = self._service.engine.codec.tokenizer
        for place, (number, logprob) in enumerate(zip(ids, logprobs, strict=False)):
            top = {tokenizer.text([other]): value for other, value in tops[place]} if tops else None
            told.add(tokenizer.text([number]), logprob, top)

    async def _continue(
        self,
        session: Session,
        first: int,
        ids: list[int],
        before: _Told,
        emit: Emitter | None,
        choices: dict[int, dict[str, Any]],
    ) -> None:
        echoed = self._service.engine.codec.tokenizer.text(ids) if self._body.echo else ""
        if emit is not None and echoed:
            for index in range(self._choices):
                await self._emit(emit, [_choice(first + index, echoed, None, None)])
        if self._nothing_new:
            for index in range(self._choices):
                await self._done(first + index, echoed, before, None, emit, choices)
            return
        async with session.fork(self._choices) as branches, anyio.create_task_group() as group:

            async def one(index: int, branch: Session) -> None:
                options: TurnOptions = {**self._options}
                if self._body.seed is not None:
                    options["seed"] = self._body.seed + index
                follow = None if emit is None else partial(self._text, first + index, emit=emit)
                async with branch.stream(**options) as turn:
                    await turn.follow(follow)
                    await self._done(first + index, echoed, before, turn.result(), emit, choices)

            for index, branch in enumerate(branches):
                group.start_soon(one, index, branch)

    async def _text(self, index: int, batch: list[events.AnyEvent], emit: Emitter) -> None:
        if text := "".join([event.text for event in batch if isinstance(event, events.TextDelta)]):
            await self._emit(emit, [_choice(index, text, None, None)])

    async def _done(
        self,
        index: int,
        echoed: str,
        before: _Told,
        reply: Reply[Any] | None,
        emit: Emitter | None,
        choices: dict[int, dict[str, Any]],
    ) -> None:
        told = _Told(list(before.tokens), list(before.logprobs), list(before.top), list(before.offsets), before.length)
        reason = "length"
        if reply is not None:
            self._usage = self._usage + reply.usage
            self._service.metrics.turn(reply.usage, reply.finish_reason, _seconds(reply.usage))
            reason = FINISH[reply.finish_reason]
            if self._body.logprobs is not None:
                self._tell_drawn(told, reply)
        logprobs = told.body() if self._body.logprobs is not None else None
        if emit is not None:
            await self._emit(emit, [_choice(index, "", logprobs, reason)])
        else:
            text = echoed + (reply.text if reply is not None else "")
            choices[index] = _choice(index, text, logprobs, reason)

    async def _emit(self, emit: Emitter, choices: list[Any], usage: dict[str, Any] | None = None) -> None:
        counted = {"usage": usage} if self._with_usage else {}
        await emit.raw(b"data: " + encoded({**self._head, "choices": choices, **counted}) + b"\n\n")

    def _usage_body(self) -> dict[str, Any]:
        drawn = self._usage.drawn
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self._prompt_tokens + drawn,
        }


def _seconds(usage: Usage) -> float:
    return usage.queue_seconds + usage.prefill_seconds + usage.decode_seconds


def _choice(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _prompts(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    numbers = [one for one in given if isinstance(one, int)]
    others = [one for one in given if not isinstance(one, int)]
    if not given or (numbers and others):
        raise refused("prompt is a text, texts, token ids, or lists of token ids; none of them empty.", param="prompt")
    return [numbers] if numbers else others
