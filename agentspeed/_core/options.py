"""What a turn is asked for: the options of one call, settled into what the engine and the parser need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypedDict, cast, final

import msgspec

from agentspeed import errors
from agentspeed._base.validate import (
    check_count,
    check_draw,
    check_flag,
    check_ids,
    check_messages,
    check_seconds,
    check_seed,
    check_text,
    shown,
)
from agentspeed._core.engine_options import EngineOptions
from agentspeed.chat.codec import History
from agentspeed.chat.output import OutputSpec, output_spec
from agentspeed.chat.parser import TurnParser
from agentspeed.chat.tags import Tags
from agentspeed.chat.transcript import OpenMessage
from agentspeed.limits import Limits
from agentspeed.messages import Message, User
from agentspeed.observing import Observer
from agentspeed.sampling import Sampling
from agentspeed.tools import Approve, Tool, tools_from
from agentspeed.transport.base import wire
from agentspeed.usage import Starting

Prompt: TypeAlias = "str | Message | Sequence[str | Message] | None"
"""What a turn adds before the model speaks; a string is a user's message."""


class TurnOptions(TypedDict, total=False):
    """Options of `stream`, `generate` and `run`, all by name."""

    tools: Sequence[Tool | Callable[..., object]] | None
    """The tools of this turn; by default, the session's. They must be among those that its first message describes."""
    tool_choice: str
    """"auto", "required", "none" or a tool's name."""
    parallel_calls: int
    sampling: Sampling | None
    temperature: float | None
    stop: str | Sequence[str]
    """Texts that end the turn. They are not part of its text, also when the message goes on, though the model has them
    before it; one that an earlier turn of the message had begun counts."""
    include_stop: bool
    """The stop text that ended the turn is part of its text."""
    max_tokens: int | None
    """The most that one turn draws. None: the session's `max_tokens`, and without that all the room that is left."""
    logprobs: int | None
    """0: of each drawn token; k: also of the k most likely ones. `logprobs` are of the model's own distribution, before
    anything of `sampling` and the grammar; `draw_logprobs` of the one that the token was drawn from."""
    seed: int | None
    """Makes the turn repeat exactly."""
    keep_on_cancel: bool
    """A cancelled turn leaves its partial text in the log instead of nothing."""
    timeout: float | None


class RunOptions(TurnOptions, total=False):
    """Options of `run` and `stream_run`, all by name: those of each of its turns, and of the run as a whole."""

    max_turns: int
    """16 by default. In the last one the model cannot call a tool, for nobody would read the result."""
    output_retries: int
    """How often an answer that is not an `output` is sent back; 1 by default."""
    limits: Limits | None
    """What all turns may spend together."""
    approve: Approve | None
    """Is asked about tools that need it, and shown every argument that would run; without it they are denied."""
    approve_at_once: bool
    """It is asked about all calls of a turn at once, instead of one after the other in call order."""
    tool_data: object
    """What tools find in their `ToolContext`."""
    expect: float | None
    """Seconds the tools will take, if you know better than the engine learns."""


class SessionOptions(TypedDict, total=False):
    """Options of a session on an engine, all by name; `Session` says what they mean."""

    system: str | None
    tools: Sequence[Tool | Callable[..., object]]
    sampling: Sampling | None
    private: bool
    tenant: str | None
    seed: int | None
    name: str | None
    max_tokens: int | None
    timeout: float | None
    record_logprobs: bool
    reasoning: bool
    history_reasoning: History
    template_variables: Mapping[str, Any] | None
    close_timeout: float
    idle_timeout: float | None
    observer: Observer | None


class RestoreOptions(SessionOptions, EngineOptions, total=False):
    """Options of `Session.restore`: those of the session, and of an engine of its own."""

    on_start: Callable[[Starting], object] | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """One call's options, checked. `TurnTimeout` is raised `timeout` seconds after the turn began."""

    messages: tuple[Message, ...]
    output: OutputSpec | None
    grammar: str | None
    sampling: wire.Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    include_stop: bool
    seed: int | None
    keep_on_cancel: bool
    timeout: float | None
    parser: TurnParser
    ends: bool = True
    """The model's end ids end the turn. Without, they are ids as others are: those of a given text may be among it."""

    @property
    def said(self) -> dict[str, float]:
        """The options that draws go by, for who watches."""
        given = {
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}

    def written(self) -> str:
        """The messages as JSON, for who watches."""
        return msgspec.json.encode(self.messages).decode()

    def command(self, stop_ids: tuple[int, ...], goes_on_with: OpenMessage | None) -> wire.Generate:
        """All but the ids; the grammar and the stop texts go through what there is of the open message first."""
        continues = 0 if goes_on_with is None else len(goes_on_with.ids)
        # Only as many bytes as a stop text has can have begun one, and an id has one byte at least.
        begun = 0 if goes_on_with is None else min(goes_on_with.since_stop, max(map(_bytes, self.stop), default=0))
        grammar = None if self.grammar is None else wire.Grammar(source=self.grammar, consumed=continues)
        return wire.Generate(
            request=0,
            branch=0,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop_ids=stop_ids if self.ends else (),
            stop_strings=tuple(text.encode() for text in self.stop),
            grammar=grammar,
            stop_consumed=begun,
            penalty_consumed=continues,
            seed=self.seed,
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a session says where a call says nothing."""

    tools: tuple[Tool, ...]
    sampling: Sampling
    timeout: float | None
    record_logprobs: bool
    reasoning: bool
    max_tokens: int | None = None
    history_reasoning: History = "template"
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    observer: Observer | None = None
    plain: bool = False
    """The log is a text and no conversation: no template writes in it, and nothing in it is a mark."""
    missing: tuple[str, ...] = ()
    """Tools that the session's first message describes and that were not given: it can be read, and takes no turns."""


def _bytes(text: str) -> int:
    return len(text.encode())


def turn_options(options: RunOptions) -> TurnOptions:
    """The options of a run that belong to each of its turns."""
    return cast("TurnOptions", {name: value for name, value in options.items() if name in TurnOptions.__annotations__})


def check_option_names(options: TurnOptions, known: type[TurnOptions] = TurnOptions) -> None:
    """Raises `InvalidRequest` for an option that no turn has, or, where `known` is `RunOptions`, no run."""
    unknown = sorted(options.keys() - known.__annotations__.keys())
    if unknown:
        drawing = [name for name in unknown if name in Sampling.__dataclass_fields__]
        hint = f" Give them as sampling=Sampling({', '.join(f'{name}=...' for name in drawing)})." if drawing else ""
        raise errors.InvalidRequest(
            f"Unknown options {', '.join(unknown)}.",
            remedy=f"The options are: {', '.join(sorted(known.__annotations__))}.{hint}",
        )


_OF_ENGINES: Final = frozenset({"revision", "api_key", "http_client"})
"""What `Engine` takes beside the options of its process."""


def check_session(
    *,
    history_reasoning: str,
    on_engine: bool,
    on_start: object,
    system: str | None,
    sampling: Sampling | None,
    private: bool,
    tenant: str | None,
    seed: int | None,
    name: str | None,
    max_tokens: int | None,
    timeout: float | None,
    close_timeout: float,
    idle_timeout: float | None,
    engine_options: Mapping[str, Any],
) -> None:
    """Raises `InvalidRequest` for an argument of a session that cannot be. `on_engine`: it was given an `Engine`."""
    for what, text in (("system", system), ("tenant", tenant), ("name", name)):
        if text is not None:
            check_text(what, text)
    if sampling is not None:
        check_sampling(sampling)
    check_flag("private", private)
    check_seed(seed)
    _check_max_tokens(max_tokens)
    check_seconds("timeout", timeout)
    check_seconds("close_timeout", close_timeout, none=False)
    if history_reasoning not in ("template", "keep"):
        raise errors.InvalidRequest(f"history_reasoning is {history_reasoning!r}; it must be 'template' or 'keep'.")
    check_seconds("idle_timeout", idle_timeout)
    known = TurnOptions.__annotations__.keys() | Sampling.__dataclass_fields__.keys()
    if misplaced := sorted(engine_options.keys() & known):
        raise errors.InvalidRequest(
            f"A session has no options {', '.join(misplaced)}.",
            remedy="Options of a turn are given to generate, stream or run; what all turns draw by, as "
            "sampling=Sampling(...).",
        )
    if alone := sorted(engine_options.keys() & _OF_ENGINES):
        raise errors.InvalidRequest(
            f"A session takes no {' and no '.join(alone)}; an engine does.",
            remedy=f"Make it with Engine(model, {'=..., '.join(alone)}=...), and open sessions on it.",
        )
    if on_engine and on_start is not None:
        raise errors.InvalidRequest(
            "on_start is told of an engine that a session starts, and this one has an Engine.",
            remedy="Give it to Engine(...).",
        )
    if on_engine and engine_options:
        raise errors.InvalidRequest(
            f"Unknown options {', '.join(sorted(engine_options))}.",
            remedy="Engine options are given to Engine(...).",
        )


def build_request(prompt: Prompt, output: Any, options: TurnOptions, defaults: Defaults, tags: Tags) -> TurnRequest:
    """`tags`: the marks of the model's next message. Raises `InvalidRequest`, `SchemaUnsupported` or TypeError for what
    cannot be asked for."""
    if defaults.missing:
        raise errors.InvalidRequest(
            f"The session's first message describes the tools {', '.join(defaults.missing)}, which were not given.",
            remedy="Give them to Session.restore(..., tools=[...]); without them a session can only be read.",
        )
    messages = messages_of(prompt)
    if defaults.plain and messages:
        raise no_messages()
    given = options.get("tools")
    tools = defaults.tools if given is None else _among(tools_from(given), defaults.tools)
    spec = output_spec(output)
    stop = options.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (stop,)
    if not all(isinstance(text, str) and text for text in stops):
        raise errors.InvalidRequest(f"stop is {shown(stop)}; it must be one text or several, none of them empty.")
    for text in stops:
        check_text("stop", text)
    timeout = options.get("timeout")
    timeout = defaults.timeout if timeout is None else timeout
    check_seconds("timeout", timeout)
    keep = options.get("keep_on_cancel", False)
    check_flag("keep_on_cancel", keep)
    include = options.get("include_stop", False)
    check_flag("include_stop", include)
    return TurnRequest(
        messages=messages,
        output=spec,
        grammar=_grammar(spec, tools, options, defaults, tags),
        sampling=_sampling(options, defaults),
        max_tokens=_max_tokens(options, defaults),
        stop=stops,
        include_stop=include,
        seed=_seed(options),
        keep_on_cancel=keep,
        timeout=timeout,
        parser=TurnParser(
            tags,
            reasoning=defaults.reasoning,
            tools={tool.name: tool.schema for tool in tools},
            marked=not defaults.plain,
        ),
    )


def plain_text(text: str | Sequence[int], options: SessionOptions) -> str | tuple[int, ...]:
    """What a session over a text begins with. Raises `InvalidRequest`."""
    if options.get("system") or options.get("tools") or options.get("reasoning"):
        raise no_messages()
    if isinstance(text, str):
        check_text("text", text)
        return text
    return check_ids("text", text)


def no_messages() -> errors.InvalidRequest:
    """Of a session over a plain text."""
    return errors.InvalidRequest(
        "This session is over a plain text, which has no messages.",
        remedy="Call generate() without a prompt; for a conversation, use Session(...).",
    )


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    """The messages a prompt stands for. Raises `InvalidRequest` for anything that is none."""
    several = () if prompt is None else prompt if isinstance(prompt, list | tuple) else (prompt,)
    messages: list[Message] = []
    for item in several:
        if not isinstance(item, str | Message):
            raise errors.InvalidRequest(f"{shown(item)} is no message.", remedy="Give a text or User(...).")
        messages.append(User(item) if isinstance(item, str) else item)
    check_messages(messages)
    return tuple(messages)


def _among(tools: tuple[Tool, ...], known: tuple[Tool, ...]) -> tuple[Tool, ...]:
    described = {tool.name: tool.schema for tool in known}
    if unknown := [tool.name for tool in tools if tool.name not in described]:
        raise errors.InvalidRequest(
            f"The session's first message does not describe the tools {', '.join(unknown)}.",
            remedy="Give them to Session(tools=[...]); a call may offer fewer of them.",
        )
    if other := [tool.name for tool in tools if tool.schema != described[tool.name]]:
        raise errors.InvalidRequest(
            f"The session's first message describes other parameters of the tools {', '.join(other)}.",
            remedy="Keep the parameters, or give the tool another name and open a session with it.",
        )
    return tools


def _grammar(
    spec: OutputSpec | None, tools: tuple[Tool, ...], options: TurnOptions, defaults: Defaults, tags: Tags
) -> str | None:
    choice, parallel = options.get("tool_choice", "auto"), options.get("parallel_calls", 16)
    check_count("parallel_calls", parallel)
    if not tools and choice in ("auto", "none"):
        tools, choice = defaults.tools, "none"  # the model was told about them: what this turn leaves out it forbids
    if not tools and spec is None and choice == "none":
        return None
    from agentspeed.chat.grammar import turn_grammar

    return turn_grammar(
        tools=tools,
        tool_choice=choice,
        parallel_calls=parallel,
        output=spec,
        reasoning=defaults.reasoning,
        tags=tags,
    )


def _sampling(options: TurnOptions, defaults: Defaults) -> wire.Sampling:
    given = options.get("sampling")
    base = defaults.sampling if given is None else given
    check_sampling(base)
    heat, logprobs = options.get("temperature"), options.get("logprobs")
    check_draw("temperature", heat, none=True)
    check_draw("logprobs", logprobs, whole=True, none=True)
    if logprobs is None and defaults.record_logprobs:
        logprobs = 0
    return wire.Sampling(
        temperature=base.temperature if heat is None else heat,
        top_k=base.top_k,
        top_p=base.top_p,
        min_p=base.min_p,
        logprobs=logprobs,
        frequency_penalty=base.frequency_penalty,
        presence_penalty=base.presence_penalty,
        repetition_penalty=base.repetition_penalty,
        logit_bias=tuple(base.logit_bias.items()),
    )


def check_sampling(sampling: Sampling) -> None:
    """Raises `InvalidRequest` for what is none, `InvalidSampling` for a value that is no number."""
    if not isinstance(sampling, Sampling):
        raise errors.InvalidRequest(f"sampling is {shown(sampling)}; it must be Sampling(...), or None.")
    check_draw("temperature", sampling.temperature)
    check_draw("top_k", sampling.top_k, whole=True, none=True)
    check_draw("top_p", sampling.top_p)
    check_draw("min_p", sampling.min_p)
    check_draw("frequency_penalty", sampling.frequency_penalty)
    check_draw("presence_penalty", sampling.presence_penalty)
    check_draw("repetition_penalty", sampling.repetition_penalty)
    if not isinstance(sampling.logit_bias, Mapping):
        raise errors.InvalidSampling(
            f"logit_bias is {shown(sampling.logit_bias)}.", remedy="It must say what is added to which vocabulary id."
        )
    for number, bias in sampling.logit_bias.items():
        check_draw("an id of logit_bias", number, whole=True)
        check_draw(f"the logit_bias of id {number}", bias)


def _max_tokens(options: TurnOptions, defaults: Defaults) -> int | None:
    most = options.get("max_tokens")
    _check_max_tokens(most)
    return defaults.max_tokens if most is None else most


def _check_max_tokens(most: object) -> None:
    check_count(
        "max_tokens", most, none=True, remedy="To compute a prompt without drawing, use add(..., prefill=True)."
    )


def _seed(options: TurnOptions) -> int | None:
    seed = options.get("seed")
    check_seed(seed)
    return seed
