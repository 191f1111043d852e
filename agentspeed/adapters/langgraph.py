"""`AgentSpeedSaver`: a durable LangGraph checkpointer in one sqlite file, which keeps the sessions of its threads too.

Checkpoints hold what a graph knows; the snapshots beside them hold the ids that its model read and drew. So a graph
that is started again from disk goes on token by token where it stopped: nothing its model said is tokenised anew."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, cast

from anyio import to_thread
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_checkpoint_id,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import INTERRUPT

from agentspeed._base.validate import check_seconds
from agentspeed.adapters.checkpoint_rows import CheckpointRows, Place, Row, Write
from agentspeed.adapters.langchain import ChatAgentSpeed
from agentspeed.errors import InvalidRequest
from agentspeed.history import Kept

_COUNTERS = "counters_since_delta_snapshot"
"""LangGraph's metadata of the channels whose value is told by writes since their last snapshot."""

INTERRUPTED: Final = "interrupt"
"""What the engine is told a graph waits for, and learns the length of."""


class AgentSpeedSaver(BaseCheckpointSaver[str]):
    """`with AgentSpeedSaver("graph.db", models=[model]) as saver: graph = builder.compile(checkpointer=saver)`

    `path`: a file, made when there is none, or ":memory:". `models`: the chat models of the graph whose sessions are
    kept with its threads; while a graph is interrupted they wait under a lease. `interrupt_seconds`: how long that
    takes, if you know better than the engine learns. Every method may be called from any thread and any event loop; a
    file may be open in several processes. Raises `InvalidRequest` for a file that another version wrote."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        models: Sequence[ChatAgentSpeed] = (),
        serde: SerializerProtocol | None = None,
        interrupt_seconds: float | None = None,
    ) -> None:
        super().__init__(serde=serde)
        check_seconds("interrupt_seconds", interrupt_seconds)
        try:
            self._rows = CheckpointRows(os.fspath(path))
        except ValueError as error:
            raise InvalidRequest(str(error), remedy="Give another file, or read it with what wrote it.") from error
        self._interrupt_seconds = interrupt_seconds
        self._models = tuple(models)
        for model in self._models:
            model.recall_sessions(self._rows.sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await to_thread.run_sync(self.close)

    def close(self) -> None:
        """Closes the file; the models go on without it."""
        for model in self._models:
            model.recall_sessions(None)
        self._rows.close()

    # ---- reading ----------------------------------------------------------------------------------------------------
    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that `config` names, or the latest of its thread and namespace."""
        thread, ns = _thread(config), _namespace(config)
        found = get_checkpoint_id(config) or self._rows.latest(thread, ns)
        return None if found is None else self._tuple(Place(thread, ns, found))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """See `get_tuple`."""
        return await to_thread.run_sync(self.get_tuple, config)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints of a thread, or of all, latest first; `filter`: of their metadata."""
        left = -1 if limit is None else limit
        places = self._places(config, before)
        while left != 0 and (found := self._next(places, filter)) is not None:
            yield found
            left -= 1

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """See `list`."""
        left = -1 if limit is None else limit
        places = await to_thread.run_sync(self._places, config, before)
        while left != 0 and (found := await to_thread.run_sync(self._next, places, filter)) is not None:
            yield found
            left -= 1

    def _places(self, config: RunnableConfig | None, before: RunnableConfig | None) -> Iterator[Place]:
        given = {} if config is None else config.get("configurable", {})
        thread = given.get("thread_id")
        return iter(
            self._rows.places(
                None if thread is None else str(thread),
                given.get("checkpoint_ns"),
                given.get("checkpoint_id"),
                None if before is None else get_checkpoint_id(before),
            )
        )

    def _next(self, places: Iterator[Place], filter: dict[str, Any] | None) -> CheckpointTuple | None:
        for place in places:
            if filter:
                row = self._rows.get(place)
                metadata = {} if row is None else self.serde.loads_typed(row[2])
                if any(metadata.get(key) != value for key, value in filter.items()):
                    continue
            if (found := self._tuple(place)) is not None:
                return found
        return None

    def _tuple(self, place: Place) -> CheckpointTuple | None:
        row = self._rows.get(place)
        if row is None:
            return None
        parent, checkpoint, metadata = row
        values = {name: self.serde.loads_typed(value) for name, value in self._rows.values(place).items()}
        return CheckpointTuple(
            config=_config(place),
            checkpoint=cast("Checkpoint", {**self.serde.loads_typed(checkpoint), "channel_values": values}),
            metadata=self.serde.loads_typed(metadata),
            parent_config=None if parent is None else _config(place._replace(id=parent)),
            pending_writes=[
                (task, channel, self.serde.loads_typed(value)) for task, channel, value in self._rows.writes(place)
            ],
        )

    # ---- writing ----------------------------------------------------------------------------------------------------
    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Stores the checkpoint below the one that `config` names, and the thread's sessions as they are now."""
        place = self._put(config, checkpoint, metadata, new_versions)
        for model in self._models:
            for key, runtime in model.runtimes().items():
                known = self._rows.session_states(key, place.thread)
                self._keep(key, place.thread, runtime.kept(place.thread, known))
        return _config(place)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """See `put`."""
        place = await to_thread.run_sync(self._put, config, checkpoint, metadata, new_versions)
        for model in self._models:
            for key, runtime in model.runtimes().items():
                known = await to_thread.run_sync(self._rows.session_states, key, place.thread)
                kept = await runtime.akept(place.thread, known)
                await to_thread.run_sync(self._keep, key, place.thread, kept)
        return _config(place)

    def sessions_of(self, thread_id: str, model: str = "") -> Sequence[bytes]:
        """What `Session.restore` reads, oldest first; `model`: the name that the chat model was called with."""
        return self._rows.sessions(model, thread_id)

    def _keep(self, key: str, thread: str, kept: Sequence[Kept]) -> None:
        for one in kept:
            self._rows.put_session(key, thread, one.name, one.state, one.data)

    def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Place:
        place = Place(_thread(config), _namespace(config), checkpoint["id"])
        bare = cast("dict[str, Any]", {**checkpoint})
        values: dict[str, Any] = bare.pop("channel_values")
        whole = cast("dict[str, Any]", get_checkpoint_metadata(config, metadata))
        row = Row(
            place=place,
            parent=get_checkpoint_id(config),
            checkpoint=self.serde.dumps_typed(bare),
            metadata=self.serde.dumps_typed(whole),
            run=None if whole.get("run_id") is None else str(whole["run_id"]),
            versions={name: str(version) for name, version in checkpoint["channel_versions"].items()},
            deltas=tuple(whole.get(_COUNTERS) or ()),
        )
        self._rows.put(
            row, {name: self.serde.dumps_typed(values[name]) if name in values else None for name in new_versions}
        )
        return place

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Stores what a task wrote after the checkpoint that `config` names. A task that was interrupted leaves the
        thread's sessions under a lease."""
        self._put_writes(config, writes, task_id, task_path)
        if _interrupted(writes):
            for model in self._models:
                for runtime in model.runtimes().values():
                    _ = runtime.expect(_thread(config), self._interrupt_seconds, INTERRUPTED)

    def _put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> None:
        named = get_checkpoint_id(config)
        if named is None:
            raise InvalidRequest("config names no checkpoint_id.", remedy="Give the config that put returned.")
        self._rows.put_writes(
            Place(_thread(config), _namespace(config), named),
            [
                Write(
                    task=task_id,
                    place=WRITES_IDX_MAP.get(channel, at),
                    channel=channel,
                    value=self.serde.dumps_typed(value),
                    path=task_path,
                )
                for at, (channel, value) in enumerate(writes)
            ],
        )

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """See `put_writes`."""
        await to_thread.run_sync(self._put_writes, config, writes, task_id, task_path)
        if _interrupted(writes):
            for model in self._models:
                for runtime in model.runtimes().values():
                    _ = await runtime.aexpect(_thread(config), self._interrupt_seconds, INTERRUPTED)

    # ---- what goes, and what is copied ------------------------------------------------------------------------------
    def delete_thread(self, thread_id: str) -> None:
        """All that is stored of it; its idle sessions are closed, so what only they held is free."""
        self._rows.delete_thread(str(thread_id))
        for model in self._models:
            for runtime in model.runtimes().values():
                runtime.forget(str(thread_id))

    async def adelete_thread(self, thread_id: str) -> None:
        """See `delete_thread`."""
        await to_thread.run_sync(self._rows.delete_thread, str(thread_id))
        for model in self._models:
            for runtime in model.runtimes().values():
                await runtime.aforget(str(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """The checkpoints that these runs made, with their writes. Those that a `DeltaChannel` of a later checkpoint is
        told by stay; they go when both runs are named."""
        self._rows.delete_runs([str(run) for run in run_ids])

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """See `delete_for_runs`."""
        await to_thread.run_sync(self.delete_for_runs, run_ids)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Every checkpoint with its writes, and the sessions: both threads go on from there without each other."""
        self._rows.copy_thread(str(source_thread_id), str(target_thread_id))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """See `copy_thread`."""
        await to_thread.run_sync(self.copy_thread, source_thread_id, target_thread_id)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """What stays: with "keep_latest" the latest checkpoint of each namespace, and the ancestors that its
        `DeltaChannel`s are told by; with "delete" nothing. Raises `InvalidRequest` for another strategy."""
        _check_strategy(strategy)
        for thread in thread_ids:
            if strategy == "delete":
                self.delete_thread(thread)
            else:
                self._rows.keep_latest(str(thread))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """See `prune`."""
        _check_strategy(strategy)
        for thread in thread_ids:
            if strategy == "delete":
                await self.adelete_thread(thread)
            else:
                await to_thread.run_sync(self._rows.keep_latest, str(thread))

    def get_next_version(self, current: str | None, channel: None) -> str:
        """Increasing, and different on every branch of a thread's history."""
        number = 0 if current is None else int(str(current).partition(".")[0])
        return f"{number + 1:032}.{random.getrandbits(62):019}"


def _interrupted(writes: Sequence[tuple[str, Any]]) -> bool:
    return any(channel == INTERRUPT for channel, _ in writes)


def _check_strategy(strategy: str) -> None:
    if strategy not in ("keep_latest", "delete"):
        raise InvalidRequest(f"strategy is {strategy!r}; it must be 'keep_latest' or 'delete'.")


def _thread(config: RunnableConfig) -> str:
    thread = config.get("configurable", {}).get("thread_id")
    if thread is None:
        raise InvalidRequest(
            "config names no thread.", remedy='Invoke the graph with {"configurable": {"thread_id": "..."}}.'
        )
    return str(thread)


def _namespace(config: RunnableConfig) -> str:
    return str(config.get("configurable", {}).get("checkpoint_ns", ""))


def _config(place: Place) -> RunnableConfig:
    return {"configurable": {"thread_id": place.thread, "checkpoint_ns": place.ns, "checkpoint_id": place.id}}
