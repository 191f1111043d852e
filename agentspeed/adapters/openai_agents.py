"""`AgentSpeedModel` and `AgentSpeedProvider`: models of the OpenAI Agents SDK whose items find their session."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from agents import Model, ModelProvider, ModelResponse, ModelSettings, ModelTracing, Usage
from agents.agent_output import AgentOutputSchemaBase
from agents.exceptions import ModelBehaviorError, UserError
from agents.handoffs import Handoff
from agents.items import TResponseInputItem, TResponseStreamEvent
from agents.memory import SessionSettings
from agents.memory.session_settings import resolve_session_limit
from agents.models.chatcmpl_converter import Converter
from agents.models.chatcmpl_stream_handler import ChatCmplStreamHandler
from agents.models.fake_id import FAKE_RESPONSES_ID
from agents.tool import Tool
from agents.tracing import generation_span
from anyio import to_thread
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessage
from openai.types.completion_usage import PromptTokensDetails
from openai.types.responses import Response
from openai.types.responses.response_prompt_param import ResponsePromptParam
from openai.types.responses.response_usage import InputTokensDetails

from agentspeed import errors, events
from agentspeed.adapters.agent_items import ItemsInFile, ItemsInMemory, ItemStore
from agentspeed.adapters.calls import Call, Streamed, new_call_id, prompt_tokens, whole
from agentspeed.adapters.runtime import Runtime, Source
from agentspeed.message_formats.openai import call_of
from agentspeed.messages import ToolCall
from agentspeed.replies import Reply
from agentspeed.sampling import Sampling
from agentspeed.session import TurnOptions

T = TypeVar("T")
_FINISH: Final = {"max_tokens": "length", "tool_calls": "tool_calls"}


class AgentSpeedModel(Model):
    """`Agent(name="...", model=AgentSpeedModel())` for the shipped model; `model` is a folder or a repository id,
    `engine` one that runs, a session to begin from, or a server's address, which `api_key` is for.

    Each call sends its whole list of items; the longest known log is continued or branched, and the usage's
    `input_tokens_details.cached_tokens` says how many tokens that saved. An output type is constrained decoding.
    Functions are the tools that there are; hosted ones are refused. Needs asyncio."""

    def __init__(
        self,
        model: str | None = None,
        *,
        engine: Source | None = None,
        api_key: str | None = None,
        reasoning: bool = False,
        tenant: str | None = None,
        **engine_options: Any,
    ) -> None:
        self.model = model or "nano"
        self._tenant = tenant or ""
        self._runtime = Runtime(
            model,
            engine=engine,
            api_key=api_key,
            reasoning=reasoning,
            engine_options=cast("Any", engine_options),
        )

    async def close(self) -> None:
        """Closes the sessions of this event loop; they end by themselves when idle."""
        await self._runtime.aclose()

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None = None,
        conversation_id: str | None = None,
        prompt: ResponsePromptParam | None = None,
    ) -> ModelResponse:
        """One turn."""
        _check_state(previous_response_id, conversation_id, prompt)
        call = self._call(system_instructions, input, model_settings, tools, output_schema, handoffs)
        with generation_span(model=self.model, disabled=tracing.is_disabled()) as span:
            reply = await whole(self._runtime, call)
            message = ChatCompletionMessage.model_validate(_message(reply))
            if tracing.include_data():
                span.span_data.input = [dict(one) for one in call.messages]
                span.span_data.output = [message.model_dump()]
            usage = _usage(reply)
            span.span_data.usage = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
        return ModelResponse(output=Converter.message_to_output_items(message), usage=usage, response_id=None)

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None = None,
        conversation_id: str | None = None,
        prompt: ResponsePromptParam | None = None,
    ) -> AsyncIterator[TResponseStreamEvent]:
        """One turn, as it is written. Closing the iterator cancels it."""
        _check_state(previous_response_id, conversation_id, prompt)
        call = self._call(system_instructions, input, model_settings, tools, output_schema, handoffs)
        response = Response(
            id=FAKE_RESPONSES_ID,
            created_at=time.time(),
            model=self.model,
            object="response",
            output=[],
            tool_choice="auto",
            tools=[],
            parallel_tool_calls=model_settings.parallel_tool_calls is not False,
        )
        with generation_span(model=self.model, disabled=tracing.is_disabled()) as span:
            async with Streamed(self._runtime, call) as streamed:
                chunks: Any = _chunks(streamed, self.model)
                async for event in ChatCmplStreamHandler.handle_stream(response, chunks, model=self.model):
                    if event.type == "response.completed":
                        if (usage := event.response.usage) is not None:
                            span.span_data.usage = {
                                "input_tokens": usage.input_tokens,
                                "output_tokens": usage.output_tokens,
                            }
                        if tracing.include_data():
                            span.span_data.input = [dict(one) for one in call.messages]
                            span.span_data.output = [event.response.model_dump()]
                    yield event

    def _call(
        self,
        system: str | None,
        input: str | list[TResponseInputItem],
        settings: ModelSettings,
        tools: Sequence[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: Sequence[Handoff],
    ) -> Call:
        messages = cast("list[dict[str, Any]]", Converter.items_to_messages(input, model=self.model))
        if system:
            messages.insert(0, {"role": "system", "content": system})
        made: list[Any] = [Converter.tool_to_openai(tool) for tool in tools]
        made += [Converter.convert_handoff_tool(handoff) for handoff in handoffs]
        choice = settings.tool_choice or "auto"
        if not isinstance(choice, str):
            raise UserError(f"tool_choice is {choice!r}; tools of a hosted server are not there for this model.")
        options: TurnOptions = {
            "sampling": Sampling(
                temperature=settings.temperature or 0.0,
                top_p=1.0 if settings.top_p is None else settings.top_p,
                frequency_penalty=settings.frequency_penalty or 0.0,
                presence_penalty=settings.presence_penalty or 0.0,
            ),
            "tool_choice": choice if made else "auto",
            "max_tokens": settings.max_tokens,
            "timeout": settings.timeout,
        }
        if settings.parallel_tool_calls is False:
            options["parallel_calls"] = 1
        plain = output_schema is None or output_schema.is_plain_text()
        return Call(
            messages=messages,
            tools=cast("list[Mapping[str, Any]]", made),
            shape=None if plain or output_schema is None else output_schema.json_schema(),
            options=options,
            tenant=self._tenant,
        )


class AgentSpeedProvider(ModelProvider):
    """`RunConfig(model_provider=AgentSpeedProvider())`: an agent's model name is a folder, a repository id, or none for
    the shipped model. `engine`: every name is answered by this one. The options are those of `AgentSpeedModel`."""

    def __init__(self, *, engine: Source | None = None, **options: Any) -> None:
        self._engine = engine
        self._options = options
        self._models: dict[str | None, AgentSpeedModel] = {}

    def get_model(self, model_name: str | None) -> Model:
        """The same model for the same name, so that its sessions are found again."""
        if model_name not in self._models:
            self._models[model_name] = AgentSpeedModel(model_name, engine=self._engine, **self._options)
        return self._models[model_name]

    async def aclose(self) -> None:
        """Closes the sessions of all its models on this event loop."""
        for model in self._models.values():
            await model.close()


class AgentSpeedSession:
    """A conversation of the SDK that forks: `Runner.run(agent, "...", session=session)`, then `session.fork()`.

    The items are kept here; the model finds their session, and rows that two forks have in common are computed once.
    `path`: a file that keeps them, from which a session of the same id goes on in another process; without it they are
    gone with this one. `items`: those that a new one begins with, as `get_items` gave them. Raises `InvalidRequest`
    for a file that cannot be used, and for `items` where it has some of that id already."""

    def __init__(
        self,
        session_id: str | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        items: Sequence[TResponseInputItem] = (),
        session_settings: SessionSettings | None = None,
    ) -> None:
        self.session_id = session_id or f"session_{secrets.token_hex(8)}"
        self.session_settings = session_settings
        self.path = path
        self._items: ItemStore = ItemsInMemory() if path is None else ItemsInFile(path, self.session_id)
        if items:
            if self._items.latest(1):
                raise errors.InvalidRequest(
                    f"{path} has items of the session {self.session_id!r} already.",
                    remedy="Leave items out to go on with them, or give another session_id.",
                )
            self._items.add(cast("Any", items))

    def fork(self, session_id: str | None = None, *, at: int | None = None) -> AgentSpeedSession:
        """Another one with the same items, or the first `at` of them, in the same file; neither sees what the other
        goes on with. To be called between two runs: one that goes on has added a part of its items. Raises
        `InvalidRequest` when there are not so many."""
        items = self._items.latest(None)
        if at is not None and not 0 <= at <= len(items):
            raise errors.InvalidRequest(f"at is {at}; the session has {len(items)} items.")
        return AgentSpeedSession(session_id, self.path, items=items[:at], session_settings=self.session_settings)

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """The latest `limit` items, or all, in their order."""
        most = resolve_session_limit(limit, self.session_settings)
        return await self._beside(lambda: self._items.latest(None if most is None else max(0, most)))

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Behind those that there are."""
        await self._beside(lambda: self._items.add(cast("Any", items)))

    async def pop_item(self) -> TResponseInputItem | None:
        """The latest item, which is not in the session any more."""
        return await self._beside(self._items.pop)

    async def clear_session(self) -> None:
        """All items go."""
        await self._beside(self._items.clear)

    async def _beside(self, work: Callable[[], T]) -> T:
        """In a thread, where a disk is waited for."""
        return work() if self.path is None else await to_thread.run_sync(work)

    def __repr__(self) -> str:
        kept = "in memory" if self.path is None else os.fspath(self.path)
        return f"<{type(self).__name__} {self.session_id} {kept}>"


def _check_state(previous_response_id: str | None, conversation_id: str | None, prompt: object) -> None:
    given = {"previous_response_id": previous_response_id, "conversation_id": conversation_id, "prompt": prompt}
    if names := [name for name, value in given.items() if value is not None]:
        raise UserError(
            f"{', '.join(names)}: this model keeps no state under ids. Send the items, or give Runner a session=."
        )


def _message(reply: Reply[Any]) -> dict[str, Any]:
    if not reply.text and not reply.tool_calls and reply.finish_reason == "max_tokens":
        raise ModelBehaviorError("max_tokens ended the turn before the model said anything.")
    found: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.reasoning:
        found["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        found["tool_calls"] = [
            call_of(ToolCall(id=new_call_id(), name=call.name, arguments=call.arguments)) for call in reply.tool_calls
        ]
    return found


def _usage(reply: Reply[Any]) -> Usage:
    prompt = prompt_tokens(reply.usage)
    return Usage(
        requests=1,
        input_tokens=prompt,
        output_tokens=reply.usage.drawn,
        total_tokens=prompt + reply.usage.drawn,
        input_tokens_details=InputTokensDetails(cached_tokens=reply.usage.prefill_saved, cache_write_tokens=0),
    )


async def _chunks(streamed: Streamed, model: str) -> AsyncIterator[ChatCompletionChunk]:
    """The turn's events as chunks of a chat completion, which the SDK makes its own events of."""

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk.model_validate(
            {
                "id": FAKE_RESPONSES_ID,
                "object": "chat.completion.chunk",
                "created": int(time.time()),
                "model": model,
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
            }
        )

    async for event in streamed:
        match event:
            case events.TextDelta(text=text):
                yield chunk({"content": text})
            case events.ReasoningDelta(text=text):
                yield chunk({"reasoning_content": text})
            case events.ToolCallStarted(index=index, name=name):
                function = {"name": name, "arguments": ""}
                yield chunk(
                    {"tool_calls": [{"index": index, "id": new_call_id(), "type": "function", "function": function}]}
                )
            case events.ToolCallDelta(index=index, arguments=text):
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            case _:
                pass
    reply = streamed.reply
    prompt = prompt_tokens(reply.usage)
    last = chunk({}, _FINISH.get(reply.finish_reason, "stop"))
    last.usage = CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=reply.usage.drawn,
        total_tokens=prompt + reply.usage.drawn,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=reply.usage.prefill_saved),
    )
    yield last
