"""`ChatAgentSpeed`: a LangChain chat model whose message lists find their session; nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import anyio
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.load.load import ALL_SERIALIZABLE_MAPPINGS
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.runnables.config import ensure_config
from langchain_core.tools import BaseTool
from langchain_core.utils import secret_from_env
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from agentspeed import errors, events
from agentspeed.adapters.calls import Call, Streamed, new_call_id, prompt_tokens, whole
from agentspeed.adapters.langchain_errors import public
from agentspeed.adapters.runtime import Runtime, Source
from agentspeed.history import hint_of
from agentspeed.sampling import Sampling
from agentspeed.session import TurnOptions
from agentspeed.turn import Reply
from agentspeed.usage import Usage

_FINISH = {"stop_id": "stop", "grammar_end": "stop", "stop_string": "stop", "max_tokens": "length"}


class ChatAgentSpeed(BaseChatModel):
    """`ChatAgentSpeed()` for the shipped model; `model` is a folder or a repository id, `engine` one that runs,
    a session to begin from, or a server's address.

    Each call sends its whole message list, as LangChain does; the longest known log is continued or branched, and the
    reply's `usage_metadata.input_token_details.cache_read` says how many tokens that saved. Native async: cancelling a
    call cancels the turn. All methods of `with_structured_output` end in constrained decoding."""

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True)

    model_name: str | None = Field(default=None, alias="model")
    engine: Any = Field(default=None, exclude=True)
    """An `agentspeed.Engine` that the caller runs, a `Session` to begin from, or a server's address, which becomes
    `base_url`; None: the process-wide one of the model and `engine_options`."""
    base_url: str | None = None
    """Of an `agentspeed serve` whose engine is used; `api_key` is for it."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    api_key: SecretStr | None = Field(default_factory=secret_from_env("AGENTSPEED_API_KEY", default=None))
    """Of a server; local engines need none. By default what `AGENTSPEED_API_KEY` says."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    timeout: float | None = None
    max_retries: int = 2
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    reasoning: bool = False
    tenant: str | None = None
    streaming: bool = False
    _runtimes: dict[str | None, Runtime] = PrivateAttr(default_factory=dict)
    _recall: Callable[[str, str], list[bytes]] | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _address(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("engine"), str):
            return {**given, "base_url": given["engine"], "engine": None}
        return given

    # ---- what LangChain asks about a model --------------------------------------------------------------------------
    @property
    def _llm_type(self) -> str:
        return "agentspeed"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Everything but a running engine is plain data."""
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where `load` finds the class."""
        return ["agentspeed", "adapters", "langchain"]

    @property
    def lc_secrets(self) -> dict[str, str]:
        """What is taken from the environment instead of being written down."""
        return {"api_key": "AGENTSPEED_API_KEY"}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        found = super()._get_ls_params(stop=stop, **kwargs)
        found["ls_provider"] = "agentspeed"
        name = kwargs.get("model") or self.model_name or "nano"
        found["ls_model_name"] = name
        return found

    # ---- tools and shapes -------------------------------------------------------------------------------------------
    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """`tool_choice`: "auto", "any" or "required", "none", a tool's name, True (the only one), or OpenAI's form."""
        made = [convert_to_openai_tool(one) for one in tools]
        choice = _choice(tool_choice, [one["function"]["name"] for one in made])
        return self.bind(tools=made, tool_choice=choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | Any]:
        """A grammar keeps the text to the schema whatever the method and `strict` say; "function_calling" writes it as
        a call, and "json_mode" takes any JSON object when there is no schema."""
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        if method not in ("json_schema", "json_mode"):
            raise ValueError(f"method is {method!r}; it must be json_schema, function_calling or json_mode.")
        if kwargs:
            raise ValueError(f"Unknown options {', '.join(sorted(kwargs))}.")
        shape = {"type": "object"} if schema is None else convert_to_json_schema(cast("Any", schema))
        bound: Any = self.bind(
            output_schema=shape,
            ls_structured_output_format={"kwargs": {"method": method, "strict": strict}, "schema": shape},
        )
        parser: Any = JsonOutputParser()
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            parser = PydanticOutputParser(pydantic_object=cast("Any", schema))
        if not include_raw:
            parsed: Runnable[LanguageModelInput, Any] = bound | parser
            return parsed
        good = RunnablePassthrough.assign(
            parsed=lambda found: parser.invoke(found["raw"]), parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=bound) | good.with_fallbacks([failed], exception_key="parsing_error")

    # ---- calls ------------------------------------------------------------------------------------------------------
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        hint = _hint(run_manager)
        return self._runtime(kwargs.get("model")).call(lambda: self._whole(messages, stop, hint, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await self._whole(messages, stop, _hint(run_manager), kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        hint = _hint(run_manager)
        runtime = self._runtime(kwargs.get("model"))
        for chunk in runtime.iterate(lambda: self._chunks(messages, stop, hint, kwargs)):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for chunk in self._chunks(messages, stop, _hint(run_manager), kwargs):
            if run_manager is not None:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _whole(
        self, messages: list[BaseMessage], stop: list[str] | None, hint: str | None, kwargs: Mapping[str, Any]
    ) -> ChatResult:
        runtime = self._runtime(kwargs.get("model"))
        attempt = 0
        while True:
            try:
                reply = await whole(runtime, self._call(messages, stop, hint, kwargs))
                break
            except errors.AgentspeedError as error:
                await self._again(error, attempt)
                attempt += 1
        message = AIMessage(
            content=reply.text,
            tool_calls=[
                tool_call(name=call.name, args=json.loads(call.arguments), id=new_call_id())
                for call in reply.tool_calls
            ],
            additional_kwargs={"reasoning_content": reply.reasoning} if reply.reasoning else {},
            response_metadata=self._metadata(reply, kwargs.get("model")),
            usage_metadata=usage_metadata(reply.usage),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _chunks(
        self, messages: list[BaseMessage], stop: list[str] | None, hint: str | None, kwargs: Mapping[str, Any]
    ) -> AsyncIterator[ChatGenerationChunk]:
        runtime = self._runtime(kwargs.get("model"))
        begun, attempt = False, 0
        while True:
            try:
                async with Streamed(runtime, self._call(messages, stop, hint, kwargs)) as streamed:
                    async for event in streamed:
                        begun = True
                        if (chunk := _chunk(event)) is not None:
                            yield ChatGenerationChunk(message=chunk)
                    reply = streamed.reply
                break
            except errors.AgentspeedError as error:
                await self._again(error, self.max_retries if begun else attempt)
                attempt += 1
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                response_metadata=self._metadata(reply, kwargs.get("model")),
                usage_metadata=usage_metadata(reply.usage),
                chunk_position="last",
            )
        )

    async def _again(self, error: errors.AgentspeedError, attempt: int) -> None:
        """Waits before another attempt, or raises LangChain's error, which is ours too."""
        if not error.retryable or attempt >= self.max_retries:
            raise public(error) from error
        await anyio.sleep(min(8.0, 0.5 * 2**attempt))

    def _call(
        self, messages: list[BaseMessage], stop: list[str] | None, hint: str | None, kwargs: Mapping[str, Any]
    ) -> Call:
        return Call(
            messages=[_openai(message) for message in messages],
            tools=kwargs.get("tools") or (),
            shape=kwargs.get("output_schema"),
            options=self._options(stop, kwargs),
            tenant=self.tenant or "",
            hint=hint,
        )

    def _options(self, stop: list[str] | None, kwargs: Mapping[str, Any]) -> TurnOptions:
        heat, top_p = kwargs.get("temperature", self.temperature), kwargs.get("top_p", self.top_p)
        options: TurnOptions = {
            "sampling": Sampling(
                temperature=0.0 if heat is None else heat,
                top_k=kwargs.get("top_k", self.top_k),
                top_p=1.0 if top_p is None else top_p,
            ),
            "stop": tuple(stop or kwargs.get("stop_sequences") or self.stop or ()),
            "tool_choice": kwargs.get("tool_choice") or "auto",
            "max_tokens": kwargs.get("max_tokens", self.max_tokens),
            "timeout": kwargs.get("timeout", self.timeout),
        }
        seed = kwargs.get("seed", self.seed)
        if seed is not None:
            options["seed"] = seed
        if kwargs.get("parallel_tool_calls") is False:
            options["parallel_calls"] = 1
        return options

    def _runtime(self, model: str | None) -> Runtime:
        name = self.model_name if model is None else model
        if name not in self._runtimes:
            source: Source | None = self.base_url if self.engine is None else self.engine
            made = Runtime(
                name,
                engine=source,
                api_key=None if self.api_key is None else self.api_key.get_secret_value(),
                reasoning=self.reasoning,
                engine_options=cast("Any", self.engine_options),
            )
            self._runtimes[name] = made
            self._set_recall(name, made)
        return self._runtimes[name]

    def runtimes(self) -> dict[str, Runtime]:
        """Of each model that was called, by its name; "" is the one that no call named."""
        return {name or "": runtime for name, runtime in list(self._runtimes.items())}

    def recall_sessions(self, recall: Callable[[str, str], list[bytes]] | None) -> None:
        """Where stored sessions of a model's thread are asked for, before the thread's first turn."""
        self._recall = recall
        for name, runtime in list(self._runtimes.items()):
            self._set_recall(name, runtime)

    def _set_recall(self, name: str | None, runtime: Runtime) -> None:
        runtime.recall = None if self._recall is None else partial(self._recall, name or "")

    def _metadata(self, reply: Reply[Any], model: str | None) -> dict[str, Any]:
        return {
            "finish_reason": _FINISH.get(reply.finish_reason, reply.finish_reason),
            "model_name": model or self.model_name or "nano",
            "model_provider": "agentspeed",
        }

    async def aclose(self) -> None:
        """Closes the sessions of this event loop; they end by themselves when idle."""
        for runtime in self._runtimes.values():
            await runtime.aclose()

    def close(self) -> None:
        """Closes the sessions of calls that came without an event loop."""
        for runtime in self._runtimes.values():
            runtime.close()


# `load(..., allowed_objects="all")` reads only what this table of LangChain's names.
_ = ALL_SERIALIZABLE_MAPPINGS.setdefault(tuple(ChatAgentSpeed.lc_id()), tuple(ChatAgentSpeed.lc_id()))


def usage_metadata(usage: Usage) -> UsageMetadata:
    """As LangChain counts: `cache_read` is a part of the input."""
    prompt = prompt_tokens(usage)
    return UsageMetadata(
        input_tokens=prompt,
        output_tokens=usage.drawn,
        total_tokens=prompt + usage.drawn,
        input_token_details=InputTokenDetails(cache_read=usage.prefill_saved),
    )


def _chunk(event: events.AnyEvent) -> AIMessageChunk | None:
    match event:
        case events.TextDelta(text=text):
            return AIMessageChunk(content=text)
        case events.ReasoningDelta(text=text):
            return AIMessageChunk(content="", additional_kwargs={"reasoning_content": text})
        case events.ToolCallStarted(index=index, name=name):
            return AIMessageChunk(
                content="",
                tool_call_chunks=[tool_call_chunk(name=name, args="", id=new_call_id(), index=index)],
            )
        case events.ToolCallDelta(index=index, arguments=text):
            return AIMessageChunk(
                content="", tool_call_chunks=[tool_call_chunk(name=None, args=text, id=None, index=index)]
            )
        case _:
            return None


def _choice(tool_choice: str | dict[str, Any] | bool | None, names: Sequence[str]) -> str:
    if tool_choice is None or tool_choice is False:
        return "auto"
    if tool_choice is True:
        if len(names) != 1:
            raise ValueError(f"tool_choice=True needs exactly one tool; there are {len(names)}.")
        return names[0]
    if isinstance(tool_choice, str):
        found = "required" if tool_choice == "any" else tool_choice
    else:
        found = str(tool_choice.get("function", tool_choice).get("name"))
    if found not in ("auto", "required", "none", *names):
        raise ValueError(f"tool_choice is {tool_choice!r}; the tools are: {', '.join(names) or 'none'}.")
    return found


def _openai(message: BaseMessage) -> dict[str, Any]:
    """A message in OpenAI's form. What the model said is taken from its text and its calls, since its content may be
    blocks of any of LangChain's forms."""
    found: Any = (
        convert_to_openai_messages(message)
        if not isinstance(message, AIMessage)
        else {
            "role": "assistant",
            "content": str(message.text),
            "reasoning_content": message.additional_kwargs.get("reasoning_content", ""),
            "tool_calls": [
                {
                    "id": call["id"] or "",
                    "type": "function",
                    "function": {"name": call["name"], "arguments": json.dumps(call["args"], ensure_ascii=False)},
                }
                for call in message.tool_calls
            ],
        }
    )
    return cast("dict[str, Any]", found)


def _hint(run_manager: Any) -> str | None:
    """The graph's thread, if there is one: it decides nothing but whether a session may go back. Where LangChain
    streams on somebody's behalf it gives no run manager; the configuration of the node that runs says the same."""
    metadata = getattr(run_manager, "metadata", None) or ensure_config().get("metadata") or {}
    thread = metadata.get("thread_id")
    return None if thread is None else hint_of(str(thread), str(metadata.get("langgraph_checkpoint_ns", "")))
