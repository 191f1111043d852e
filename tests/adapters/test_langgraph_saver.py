"""The checkpointer under the published conformance suite, and what the suite does not ask: files, threads, deltas."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pytest

conformance = pytest.importorskip("langgraph.checkpoint.conformance", reason="install the group conformance-langchain")

from langchain_core.runnables import RunnableConfig  # noqa: E402
from langgraph.channels import DeltaChannel  # noqa: E402
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint  # noqa: E402
from langgraph.graph import END, START, StateGraph  # noqa: E402
from typing_extensions import TypedDict  # noqa: E402

from agentspeed.adapters.langgraph import AgentSpeedSaver  # noqa: E402
from agentspeed.errors import InvalidRequest  # noqa: E402


def _added(state: list[str] | None, more: list[list[str]]) -> list[str]:
    return [*(state or []), *(one for some in more for one in some)]


class _Words(TypedDict):
    words: Annotated[list[str], DeltaChannel(_added, list, snapshot_frequency=1000)]


def _graph(saver: AgentSpeedSaver) -> Any:
    builder: Any = StateGraph(_Words)
    builder.add_node("one", lambda state: {"words": [f"one of {len(state['words'])}"]})
    builder.add_node("two", lambda state: {"words": [f"two of {len(state['words'])}"]})
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    builder.add_edge("two", END)
    return builder.compile(checkpointer=saver)


def _config(thread: str, **more: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": "", **more}}


def _put(saver: AgentSpeedSaver, thread: str, value: str, parent: RunnableConfig | None = None) -> RunnableConfig:
    version = saver.get_next_version(None, None)
    checkpoint: Checkpoint = {
        **empty_checkpoint(),
        "channel_values": {"it": value},
        "channel_versions": {"it": version},
    }
    return saver.put(parent or _config(thread), checkpoint, {"source": "loop", "step": 0}, {"it": version})


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["memory", "file"])
async def test_every_check_of_the_published_suite_passes_base_and_extended(where: str, tmp_path: Path) -> None:
    count = 0

    async def made() -> AsyncGenerator[AgentSpeedSaver, None]:
        nonlocal count
        count += 1
        async with AgentSpeedSaver(":memory:" if where == "memory" else tmp_path / f"{count}.db") as saver:
            yield saver

    report = await conformance.validate(conformance.checkpointer_test(name=f"AgentSpeedSaver {where}")(made))
    failed = {name: result.failures for name, result in report.results.items() if result.failures}
    assert failed == {}
    assert all(result.detected and result.passed for result in report.results.values())
    assert len(report.results) == 8


def test_what_was_put_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    with AgentSpeedSaver(tmp_path / "graph.db") as saver:
        stored = _put(saver, "t", "first")
        saver.put_writes(stored, [("it", "second")], "task")
    with AgentSpeedSaver(tmp_path / "graph.db") as again:
        found = again.get_tuple(_config("t"))
        assert found is not None
        assert found.checkpoint["channel_values"] == {"it": "first"}
        assert found.pending_writes == [("task", "it", "second")]


def test_a_file_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "graph.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(InvalidRequest, match="version 99"):
        _ = AgentSpeedSaver(path)


def test_threads_may_put_and_read_at_once_and_two_savers_may_share_a_file(tmp_path: Path) -> None:
    with (
        AgentSpeedSaver(tmp_path / "graph.db") as one,
        AgentSpeedSaver(tmp_path / "graph.db") as other,
        ThreadPoolExecutor(8) as pool,
    ):

        def work(number: int) -> int:
            saver, parent = (one, other)[number % 2], None
            for step in range(5):
                parent = _put(saver, f"thread {number}", f"{number} {step}", parent)
                saver.put_writes(parent, [("it", step)], "task")
            return len(list(saver.list(_config(f"thread {number}"))))

        assert list(pool.map(work, range(8))) == [5] * 8
        assert len(list(one.list(None))) == 40


def test_values_of_two_branches_of_a_thread_are_told_apart(tmp_path: Path) -> None:
    with AgentSpeedSaver(":memory:") as saver:
        root = _put(saver, "t", "root")
        left, right = _put(saver, "t", "left", root), _put(saver, "t", "right", root)
        for config, value in ((left, "left"), (right, "right"), (root, "root")):
            found = saver.get_tuple(config)
            assert found is not None and found.checkpoint["channel_values"] == {"it": value}


def test_pruning_keeps_what_the_deltas_of_the_latest_checkpoint_are_told_by() -> None:
    with AgentSpeedSaver(":memory:") as saver:
        graph, config = _graph(saver), _config("t")
        for _ in range(2):
            graph.invoke({"words": ["go"]}, config)
        before = graph.get_state(config).values["words"]
        assert before == ["go", "one of 1", "two of 2", "go", "one of 4", "two of 5"]
        saver.prune(["t"])
        assert graph.get_state(config).values["words"] == before
        graph.invoke({"words": ["on"]}, config)
        assert graph.get_state(config).values["words"][6:] == ["on", "one of 7", "two of 8"]


def test_pruning_leaves_one_checkpoint_and_only_its_values_where_there_are_no_deltas(tmp_path: Path) -> None:
    with AgentSpeedSaver(tmp_path / "graph.db") as saver:
        parent = None
        for step in range(4):
            parent = _put(saver, "t", f"value {step}", parent)
        saver.prune(["t"])
        assert [one.checkpoint["channel_values"] for one in saver.list(_config("t"))] == [{"it": "value 3"}]
    connection = sqlite3.connect(tmp_path / "graph.db")
    assert connection.execute("SELECT count(*) FROM channel_values").fetchone() == (1,)
    connection.close()


def test_deleting_a_run_keeps_what_a_later_run_is_told_by() -> None:
    with AgentSpeedSaver(":memory:") as saver:
        graph, config = _graph(saver), _config("t")
        for run in ("first", "second"):
            graph.invoke({"words": ["go"]}, {**config, "metadata": {"run_id": run}})
        before = graph.get_state(config).values["words"]
        saver.delete_for_runs(["first"])
        assert graph.get_state(config).values["words"] == before
        saver.delete_for_runs(["first", "second"])
        assert list(saver.list(config)) == []


def test_a_copied_thread_outlives_its_source() -> None:
    with AgentSpeedSaver(":memory:") as saver:
        graph = _graph(saver)
        graph.invoke({"words": ["go"]}, _config("a"))
        saver.copy_thread("a", "b")
        saver.delete_thread("a")
        assert graph.get_state(_config("a")).values == {}
        assert graph.get_state(_config("b")).values["words"] == ["go", "one of 1", "two of 2"]


@pytest.mark.parametrize("config", [{}, {"configurable": {}}])
def test_a_config_without_a_thread_is_refused(config: Any) -> None:
    with AgentSpeedSaver(":memory:") as saver, pytest.raises(InvalidRequest, match="names no thread"):
        _ = saver.get_tuple(config)


def test_an_unknown_strategy_is_refused_and_loses_nothing() -> None:
    with AgentSpeedSaver(":memory:") as saver:
        _put(saver, "t", "kept")
        with pytest.raises(InvalidRequest, match="keep_latest"):
            saver.prune(["t"], strategy="keep_best")
        assert saver.get_tuple(_config("t")) is not None
