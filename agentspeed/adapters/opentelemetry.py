"""Spans and metrics of runs, turns and tools as OpenTelemetry's GenAI conventions name them.

The conventions are of "Development" status and their Python constants are deprecated, so the names stand here.
https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

import time
from typing import Any, Final, final

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import Meter, MeterProvider
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, TracerProvider

from agentspeed.observing import Began, Ending, Watch

_NAME: Final = "agentspeed"
_OPERATIONS: Final = {"run": "invoke_agent", "turn": "chat", "tool": "execute_tool"}
_REASONS: Final = {"stop_id": "stop", "grammar_end": "stop", "stop_string": "stop", "max_tokens": "length"}


@final
class Tracing:
    """An observer: `Engine(..., observer=Tracing())` or `Session(..., observer=Tracing())`.

    Spans `invoke_agent`, `chat MODEL` and `execute_tool NAME`, nested as they are and below the caller's own span.
    `content`: messages, arguments and results are in them too; by default they hold none. Without providers the global
    ones are used; while nobody set those up, nothing is recorded."""

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        content: bool = False,
    ) -> None:
        self._tools = _Tools(
            trace.get_tracer(_NAME, tracer_provider=tracer_provider),
            metrics.get_meter(_NAME, meter_provider=meter_provider),
            content,
        )

    def began(self, what: Began) -> Watch:
        """See `Observer.began`."""
        return _Watch(self._tools, what)


@final
class _Tools:
    """What all watches of one observer write with."""

    def __init__(self, tracer: Tracer, meter: Meter, content: bool) -> None:
        self.tracer = tracer
        self.content = content
        self.duration = meter.create_histogram("gen_ai.client.operation.duration", "s", "Of runs, turns and tools.")
        self.tokens = meter.create_histogram("gen_ai.client.token.usage", "{token}", "Of turns.")
        self.first = meter.create_histogram(
            "gen_ai.server.time_to_first_token", "s", "From asking to the first token of a turn."
        )
        self.each = meter.create_histogram(
            "gen_ai.server.time_per_output_token", "s", "Of a turn's tokens after the first."
        )


@final
class _Watch:
    def __init__(self, tools: _Tools, what: Began) -> None:
        self._tools = tools
        self._what = what
        self._begun = time.monotonic()
        operation = _OPERATIONS[what.kind]
        about = {"turn": what.model, "tool": what.tool}.get(what.kind)
        self._shared: dict[str, Any] = {"gen_ai.operation.name": operation, "gen_ai.provider.name": _NAME}
        if what.kind != "tool":
            self._shared["gen_ai.request.model"] = what.model
        given: dict[str, Any] = {**self._shared, "gen_ai.conversation.id": what.session_id}
        given |= {f"gen_ai.request.{name}": value for name, value in what.request.items()}
        if what.kind == "tool":
            given |= {
                "gen_ai.tool.name": what.tool,
                "gen_ai.tool.type": "function",
                "gen_ai.tool.call.id": what.call_id,
            }
        if tools.content:
            name = "gen_ai.tool.call.arguments" if what.kind == "tool" else "gen_ai.input.messages"
            given[name] = what.content()
        self._span = tools.tracer.start_span(
            f"{operation} {about}" if about else operation, kind=SpanKind.INTERNAL, attributes=given
        )
        # A turn's block may be left in another task than it was entered in, where what was attached cannot be detached.
        self._token = None if what.kind == "turn" else context.attach(trace.set_span_in_context(self._span))

    def ended(self, how: Ending) -> None:
        """See `Watch.ended`."""
        if self._token is not None:
            context.detach(self._token)
        span, kind = self._span, self._what.kind
        usage = how.usage
        prompt = usage.new + usage.resumed + usage.recomputed
        if kind != "tool":
            span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": prompt,
                    "gen_ai.usage.cache_read.input_tokens": usage.prefill_saved,
                    "gen_ai.usage.output_tokens": usage.drawn,
                    "gen_ai.response.finish_reasons": (_REASONS.get(how.reason, how.reason),),
                    "agentspeed.queue_seconds": usage.queue_seconds,
                    "agentspeed.recomputed_tokens": usage.recomputed,
                }
            )
            if usage.why:
                span.set_attribute("agentspeed.recomputed_why", usage.why)
        if self._tools.content:
            span.set_attribute("gen_ai.tool.call.result" if kind == "tool" else "gen_ai.output.messages", how.content())
        shared = dict(self._shared)
        if how.error is not None:
            shared["error.type"] = type(how.error).__name__
            span.set_attribute("error.type", type(how.error).__name__)
            span.set_status(Status(StatusCode.ERROR, str(how.error) if self._tools.content else None))
        span.end()
        self._measure(how, shared, prompt)

    def _measure(self, how: Ending, shared: dict[str, Any], prompt: int) -> None:
        tools, usage = self._tools, how.usage
        tools.duration.record(time.monotonic() - self._begun, shared)
        if self._what.kind != "turn":
            return
        tools.tokens.record(prompt, {**shared, "gen_ai.token.type": "input"})
        tools.tokens.record(usage.drawn, {**shared, "gen_ai.token.type": "output"})
        if usage.drawn:
            first = usage.queue_seconds + usage.prefill_seconds
            tools.first.record(first, shared)
        if usage.drawn > 1:
            each = usage.decode_seconds / (usage.drawn - 1)
            tools.each.record(each, shared)
