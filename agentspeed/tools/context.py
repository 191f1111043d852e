"""What a tool is told about the call it serves: given to any parameter annotated `ToolContext`, never to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, final

from agentspeed._base.validate import check_number, check_text
from agentspeed.messages import Message
from agentspeed.replies import Reply, Result
from agentspeed.usage import Usage

D = TypeVar("D")


class ToolSession(Protocol):
    """What a tool may do with the session that made the call, and with a fork of it: a part of `Session`, which it is
    when the program runs."""

    @property
    def id(self) -> str: ...
    @property
    def system(self) -> str | None: ...
    @property
    def messages(self) -> tuple[Message, ...]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def room(self) -> int: ...
    @property
    def usage(self) -> Usage: ...

    def fork(self, n: int = 1) -> AbstractAsyncContextManager[Sequence[ToolSession]]:
        """`n` children with the same context, for the time of the block."""
        ...

    async def generate(self, prompt: Any = None, *, output: Any = str, **options: Any) -> Reply[Any]:
        """One turn. On the session itself it is `SessionBusy`; on a fork it is legal."""
        ...

    async def run(self, prompt: Any = None, *, output: Any = str, **options: Any) -> Result[Any]:
        """Turns and tools until the model answers; on a fork only, as `generate`."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a tool says while it runs."""

    done: float
    total: float | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext(Generic[D]):
    """The call, the session that made it and the user's own data (`session.run(..., tool_data=...)`).

    While tools run the session takes no turns and no messages (`SessionBusy`): they would come between a call and its
    result. A tool that needs the model forks it, or opens another session. In the fork the calls that are being served
    are closed: their results go to this session."""

    call_id: str
    tool: str
    session: ToolSession
    data: D
    reports: Callable[[Report], None] | None = field(default=None, repr=False, compare=False)
    """Who is told what the tool reports."""

    def report(self, done: float, total: float | None = None, message: str = "") -> None:
        """Says how far the tool is: an event `ToolProgress` for who listens to the run; the model is not told. `total`:
        what `done` will have come to, if that is known. Raises `InvalidRequest` for what is no number."""
        check_number("done", done)
        if total is not None:
            check_number("total", total)
        check_text("message", message)
        if self.reports is not None:
            self.reports(Report(done=done, total=total, message=message))
