"""Makes an executor ready for turns in threads of their own: no other turn waits while a grammar is compiled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, final

from agentspeed_engine.kv.views import TurnSpec

_THREADS = 2
"""A grammar that takes long does not keep the next one waiting; more would take the processor from the steps."""


@final
@dataclass(frozen=True, slots=True)
class Prepared:
    """The executor is ready for a turn, or `refusal` says why it never will be."""

    turn: int
    refusal: str | None


class Prepares(Protocol):
    """What the preparer needs of an executor (`exec.executor.Executor`)."""

    def prepare(self, spec: TurnSpec) -> str | None: ...


@final
class Preparer:
    """`report` is called from its threads. They begin with the first turn: most engines never have one."""

    def __init__(self, executor: Prepares, report: Callable[[Prepared | BaseException], None]) -> None:
        self._executor = executor
        self._report = report
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="agentspeed-prepare")

    def start(self, spec: TurnSpec) -> None:
        """Returns at once."""
        _ = self._pool.submit(self._prepare, spec)

    def close(self) -> None:
        """Nothing more is begun. What is being prepared ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, spec: TurnSpec) -> None:
        try:
            done: Prepared | BaseException = Prepared(spec.turn, self._executor.prepare(spec))
        except BaseException as error:  # noqa: BLE001 - our bug: handed to the loop thread, which raises it
            done = error
        self._report(done)
