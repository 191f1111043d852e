"""`AgentSpeedModel`: a pydantic-ai model whose message histories find their session; nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, cast

from pydantic_ai import RunContext
from pydantic_ai.exceptions import ModelAPIError, UserError
from pydantic_ai.messages import (
    FinishReason,
    ModelMessage,
    ModelResponse,
    ModelResponseStreamEvent,
    SystemPromptPart,
    TextContent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.settings import ModelSettings, ToolOrOutput
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.usage import RequestUsage

from agentspeed import errors, events
from agentspeed.adapters.calls import Call, Streamed, new_call_id, prompt_tokens, whole
from agentspeed.adapters.runtime import Runtime, Source
from agentspeed.replies import Reply
from agentspeed.sampling import Sampling
from agentspeed.session import TurnOptions
from agentspeed.usage import Usage

_PROFILE: Final = ModelProfile(
    supports_tools=True,
    supports_json_schema_output=True,
    supports_json_object_output=True,
    supports_image_input=False,
    default_structured_output_mode="native",
)
_FINISH: Final[dict[str, FinishReason]] = {
    "stop_id": "stop",
    "grammar_end": "stop",
    "stop_string": "stop",
    "max_tokens": "length",
    "tool_calls": "tool_call",
}


class AgentSpeedModel(Model[Any]):
    """`Agent(AgentSpeedModel())` for the shipped model; `model` is a folder or a repository id, `engine` one that runs,
    a session to begin from, or a server's address, which `api_key` is for.

    Each request sends its whole history, as pydantic-ai does; the longest known log is continued or branched, and the
    usage's `cache_read_tokens` says how many tokens that saved. Structured output is constrained decoding in every
    output mode. Cancelling a request cancels its turn. A failure of the engine is a `ModelAPIError`, so that a
    `FallbackModel` goes on; what was asked wrongly raises agentspeed's own error. Needs asyncio."""

    def __init__(
        self,
        model: str | None = None,
        *,
        engine: Source | None = None,
        api_key: str | None = None,
        reasoning: bool = False,
        tenant: str | None = None,
        settings: ModelSettings | None = None,
        **engine_options: Any,
    ) -> None:
        super().__init__(settings=settings, profile=_PROFILE)
        self._name = model or "nano"
        self._tenant = tenant or ""
        self._runtime = Runtime(
            model,
            engine=engine,
            api_key=api_key,
            reasoning=reasoning,
            engine_options=cast("Any", engine_options),
        )

    @property
    def model_name(self) -> str:
        """The folder or repository id; "nano" for the shipped model."""
        return self._name

    @property
    def system(self) -> str:
        """Who provides it."""
        return "agentspeed"

    async def aclose(self) -> None:
        """Closes the sessions of this event loop; they end by themselves when idle."""
        await self._runtime.aclose()

    # ---- requests ---------------------------------------------------------------------------------------------------
    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        """One turn."""
        call = self._call(messages, model_settings, model_request_parameters)
        try:
            reply = await whole(self._runtime, call)
        except errors.WorldError as error:
            raise ModelAPIError(self._name, str(error)) from error
        parts: list[Any] = []
        if reply.reasoning:
            parts.append(ThinkingPart(reply.reasoning))
        if reply.text or not reply.tool_calls:
            parts.append(TextPart(reply.text))
        parts += [ToolCallPart(one.name, one.arguments, tool_call_id=new_call_id()) for one in reply.tool_calls]
        return ModelResponse(
            parts=parts,
            usage=_usage(reply.usage),
            model_name=self._name,
            provider_name=self.system,
            finish_reason=_FINISH.get(reply.finish_reason),
        )

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        """One turn, as it is written. Leaving the block early cancels it."""
        call = self._call(messages, model_settings, model_request_parameters)
        async with Streamed(self._runtime, call) as streamed:
            yield _Response(model_request_parameters=model_request_parameters, name=self._name, streamed=streamed)

    def _call(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> Call:
        settings, asked = self.prepare_request(model_settings, model_request_parameters)
        given = settings or ModelSettings()
        tools = list(asked.declared_tool_defs.values())
        choice, allowed = _choice(given, asked)
        options: TurnOptions = {
            "sampling": Sampling(
                temperature=given.get("temperature", 0.0),
                top_k=given.get("top_k"),
                top_p=given.get("top_p", 1.0),
                frequency_penalty=given.get("frequency_penalty", 0.0),
                presence_penalty=given.get("presence_penalty", 0.0),
                logit_bias=_bias(given.get("logit_bias") or {}),
            ),
            "stop": tuple(given.get("stop_sequences") or ()),
            "tool_choice": choice,
            "max_tokens": given.get("max_tokens"),
            "timeout": _seconds(given.get("timeout")),
        }
        if (seed := given.get("seed")) is not None:
            options["seed"] = seed
        if given.get("parallel_tool_calls") is False:
            options["parallel_calls"] = 1
        instructions = [part.content for part in self._get_instruction_parts(messages, asked) or ()]
        native = asked.output_mode in ("native", "prompted") and asked.output_object is not None
        return Call(
            messages=_messages(messages, instructions),
            tools=[_tool(one) for one in tools],
            allowed=allowed,
            shape=asked.output_object.json_schema if native and asked.output_object is not None else None,
            options=options,
            tenant=self._tenant,
        )


def _bias(given: Mapping[str, int]) -> dict[int, float]:
    """Raises `UserError` for a key that is no token id."""
    if wrong := [key for key in given if not (key.isascii() and key.isdecimal())]:
        raise UserError(f"logit_bias has the key {wrong[0]!r}; keys are token ids.")
    return {int(key): float(value) for key, value in given.items()}


@dataclass
class _Response(StreamedResponse):
    """A turn's events as pydantic-ai's parts."""

    name: str
    streamed: Streamed
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    async def _get_event_iterator(self) -> AsyncIterator[ModelResponseStreamEvent]:
        try:
            async for event in self.streamed:
                for part in self._parts(event):
                    yield part
        except errors.WorldError as error:
            raise ModelAPIError(self.name, str(error)) from error
        reply: Reply[Any] = self.streamed.reply
        self._usage = _usage(reply.usage)
        self.finish_reason = _FINISH.get(reply.finish_reason)

    def _parts(self, event: events.AnyEvent) -> Sequence[ModelResponseStreamEvent]:
        manager = self._parts_manager
        match event:
            case events.TextDelta(text=text):
                return list(manager.handle_text_delta(vendor_part_id="text", content=text))
            case events.ReasoningDelta(text=text):
                return list(manager.handle_thinking_delta(vendor_part_id="reasoning", content=text))
            case events.ToolCallStarted(index=index, name=name):
                return list(
                    manager.handle_tool_call_delta_events(
                        vendor_part_id=index, tool_name=name, tool_call_id=new_call_id()
                    )
                )
            case events.ToolCallDelta(index=index, arguments=text):
                return list(manager.handle_tool_call_delta_events(vendor_part_id=index, args=text))
            case _:
                return ()

    async def close_stream(self) -> None:
        """Cancels the turn."""
        await self.streamed.close()

    @property
    def model_name(self) -> str:
        """Of the model that answers."""
        return self.name

    @property
    def provider_name(self) -> str:
        """Who provides it."""
        return "agentspeed"

    @property
    def provider_url(self) -> None:
        """There is none: the model runs here."""
        return

    @property
    def timestamp(self) -> datetime:
        """When the answer began."""
        return self.at


def _usage(usage: Usage) -> RequestUsage:
    return RequestUsage(
        input_tokens=prompt_tokens(usage), output_tokens=usage.drawn, cache_read_tokens=usage.prefill_saved
    )


def _seconds(timeout: object) -> float | None:
    if timeout is None or isinstance(timeout, int | float):
        return timeout
    raise UserError(f"timeout is {timeout!r}; for a model that runs here it must be seconds.")


def _choice(given: ModelSettings, asked: ModelRequestParameters) -> tuple[str, list[str] | None]:
    """The turn's tool choice, and the tools that it may call."""
    wanted = given.get("tool_choice")
    outputs = [tool.name for tool in asked.output_tools]
    freely = "auto" if asked.allow_text_output else "required"
    if wanted is None or wanted == "auto":
        return (freely, None) if asked.declared_tool_defs else ("auto", None)
    if wanted == "none" or wanted == []:
        return (freely, outputs) if outputs else ("none", None)
    if wanted == "required":
        return "required", [tool.name for tool in asked.declared_function_tools]
    if isinstance(wanted, ToolOrOutput):
        names = [*wanted.function_tools, *outputs]
        return (freely, names) if names else ("none", None)
    names = list(wanted)
    if unknown := [name for name in names if name not in asked.declared_tool_defs]:
        raise UserError(
            f"tool_choice names {', '.join(unknown)}; the tools are: {', '.join(asked.declared_tool_defs)}."
        )
    return "required", names


def _tool(definition: ToolDefinition) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": definition.name,
            "description": definition.description or "",
            "parameters": definition.parameters_json_schema,
        },
    }


# ---- histories ------------------------------------------------------------------------------------------------------
def _messages(messages: Sequence[ModelMessage], instructions: Sequence[str]) -> list[dict[str, Any]]:
    """In OpenAI's form. System prompts and instructions stand above the conversation, wherever they were said."""
    above: list[str] = []
    found: list[dict[str, Any]] = []
    for message in messages:
        if isinstance(message, ModelResponse):
            found.append(_said(message))
            continue
        for part in message.parts:
            if isinstance(part, SystemPromptPart):
                above.append(part.content)
            else:
                found.append(_asked(part))
    return [{"role": "system", "content": text} for text in [*above, *instructions]] + found


def _asked(part: object) -> dict[str, Any]:
    if isinstance(part, UserPromptPart):
        content = [part.content] if isinstance(part.content, str) else part.content
        return {"role": "user", "content": "\n".join(_text(item) for item in content)}
    if isinstance(part, ToolReturnPart):
        text, files = part.model_response_str_and_user_content()
        if files:
            raise UserError(f"The result of {part.tool_name} holds files; this model reads text alone.")
        return {"role": "tool", "tool_call_id": part.tool_call_id, "content": text}
    raise UserError(f"A request holds a {type(part).__name__}, which this model cannot read.")


def _text(item: object) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, TextContent):
        return item.content
    raise UserError(f"A prompt holds a {type(item).__name__}; this model reads text alone.")


def _said(message: ModelResponse) -> dict[str, Any]:
    calls = [part for part in message.parts if isinstance(part, ToolCallPart)]
    return {
        "role": "assistant",
        "content": "".join(part.content for part in message.parts if isinstance(part, TextPart)),
        "reasoning_content": "".join(part.content for part in message.parts if isinstance(part, ThinkingPart)),
        "tool_calls": [
            {
                "id": call.tool_call_id,
                "type": "function",
                "function": {"name": call.tool_name, "arguments": json.dumps(call.args_as_dict(), ensure_ascii=False)},
            }
            for call in calls
        ],
    }
