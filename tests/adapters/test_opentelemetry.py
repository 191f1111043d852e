"""Spans and metrics of runs, turns and tools: how they nest, what they say, and what they never say unasked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from agentspeed import Engine, Session, tool
from agentspeed.errors import TurnTimeout
from agentspeed.observing import Began, Watch
from agentspeed.testing import ScriptedEngine, say, tool_call
from tests.support.needs import needed

export: Any = needed("opentelemetry.sdk.trace.export.in_memory_span_exporter", "spans are kept in memory")

from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402

from agentspeed.adapters.opentelemetry import Tracing  # noqa: E402

pytestmark = pytest.mark.anyio


class Recorded:
    """Everything that was recorded."""

    def __init__(self) -> None:
        self.exporter = export.InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    def tracing(self, **options: Any) -> Tracing:
        return Tracing(tracer_provider=self.provider, meter_provider=self.meters, **options)

    def spans(self) -> dict[str, list[ReadableSpan]]:
        found: dict[str, list[ReadableSpan]] = {}
        for span in self.exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found

    def metrics(self) -> set[str]:
        data = json.loads(self.reader.get_metrics_data().to_json())
        return {
            one["name"]
            for part in data["resource_metrics"]
            for scope in part["scope_metrics"]
            for one in scope["metrics"]
        }


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    made = Recorded()
    yield made
    made.provider.shutdown()
    made.meters.shutdown()


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@tool
def fail() -> str:
    """Raises."""
    raise ValueError("secret words")


async def test_a_run_is_a_span_with_its_turns_and_tools_below_it_and_no_content(recorded: Recorded) -> None:
    script = [tool_call("add", a=17, b=25) + tool_call("fail"), "It is 42."]
    async with (
        ScriptedEngine(script) as scripted,
        Session(scripted.engine, tools=[add, fail], name="sums", observer=recorded.tracing()) as session,
    ):
        with recorded.provider.get_tracer("test").start_as_current_span("caller"):
            _ = await session.run("What is 17 plus 25?")
    spans = recorded.spans()
    (run,), turns, (added,), (failed,) = (
        spans["invoke_agent"],
        spans["chat nano"],
        spans["execute_tool add"],
        spans["execute_tool fail"],
    )
    (caller,) = spans["caller"]
    assert run.parent is not None and run.parent.span_id == caller.context.span_id
    assert [span.parent.span_id for span in (*turns, added, failed) if span.parent] == [run.context.span_id] * 4
    assert run.attributes is not None and run.attributes["gen_ai.conversation.id"] == "sums"
    first = turns[0].attributes
    assert first is not None
    assert first["gen_ai.operation.name"] == "chat" and first["gen_ai.request.model"] == "nano"
    assert first["gen_ai.usage.output_tokens"] and first["gen_ai.usage.input_tokens"]
    assert turns[1].attributes is not None and turns[1].attributes["gen_ai.usage.cache_read.input_tokens"]
    assert turns[1].attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert failed.attributes is not None and failed.attributes["error.type"] == "ToolFailed"
    said = " ".join(span.to_json() for group in spans.values() for span in group)
    assert "secret words" not in said
    given = {
        name: value for name, value in (added.attributes or {}).items() if not name.endswith(".id")
    }  # drawn at random
    assert "17" not in json.dumps(given)
    assert "It is 42" not in said
    assert recorded.metrics() >= {
        "gen_ai.client.operation.duration",
        "gen_ai.client.token.usage",
        "gen_ai.server.time_to_first_token",
    }


async def test_content_is_in_the_spans_when_it_is_asked_for_and_forks_are_seen_too(recorded: Recorded) -> None:
    async with (
        ScriptedEngine([tool_call("add", a=1, b=2), "Three."]) as scripted,
        Session(scripted.engine, tools=[add], observer=recorded.tracing(content=True)) as session,
        session.fork(1) as (child,),
    ):
        reply = await child.generate("1 plus 2?")
        async with child.tool_call(reply.tool_calls[0]) as pending:
            pending.result = add.fn(**pending.arguments)
        _ = await child.generate()
    spans = recorded.spans()
    (called,) = spans["execute_tool add"]
    assert called.attributes is not None
    assert json.loads(str(called.attributes["gen_ai.tool.call.arguments"])) == {"a": 1, "b": 2}
    assert called.attributes["gen_ai.tool.call.result"] == "3"
    first, second = (span.attributes for span in spans["chat nano"])
    assert first is not None and "1 plus 2?" in str(first["gen_ai.input.messages"])
    assert second is not None and "Three." in str(second["gen_ai.output.messages"])


async def test_a_turn_that_is_too_late_is_an_error_and_an_engine_s_observer_hears_of_all_sessions(
    recorded: Recorded,
) -> None:
    async with ScriptedEngine([say("Slowly, slowly.", seconds=0.2)]) as scripted:
        scripted.engine.observer = recorded.tracing()
        async with scripted.engine.session() as session:
            with pytest.raises(TurnTimeout):
                _ = await session.generate("Hi.", timeout=0.3)
    (span,) = recorded.spans()["chat nano"]
    assert span.attributes is not None and span.attributes["error.type"] == "TurnTimeout"
    assert not span.status.is_ok


async def test_an_observer_that_raises_disturbs_no_session(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def began(self, what: Began) -> Watch:
            raise RuntimeError("no")

    async with ScriptedEngine(["Hello."]) as scripted, Session(scripted.engine, observer=Broken()) as session:
        assert (await session.generate("Hi.")).text == "Hello."
    assert "raised" in caplog.text


def test_an_engine_takes_its_observer_by_name() -> None:
    watcher = Tracing()
    assert Engine("model", observer=watcher).observer is watcher
