"""A transport to an engine without a model: everything around it is real, and the texts are what a script writes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final, final

import anyio.to_thread

from agentspeed.testing.scripted_link import ScriptedLink
from agentspeed.testing.scripted_model import Script, ScriptedModel
from agentspeed.transport.base import Connection
from agentspeed.transport.socket_link import SocketLink
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.serve.model_files import ServedFiles

_PAGE_TOKENS: Final = 64


@final
class ScriptedServer:
    """A transport with one thread per link. The script is asked in the order in which turns arrive."""

    pid = None

    def __init__(
        self, folder: Path, script: Script, *, context_limit: int | None = None, max_branches: int = 256
    ) -> None:
        """`context_limit`: None takes what the model's folder says. Raises `ModelBroken`."""
        self.max_branches = max_branches
        self._folder = folder
        self.files = ServedFiles(folder)
        self._model = ScriptedModel(folder, script, context_limit)
        self._links: list[ScriptedLink] = []
        self.commands: list[wire.Command] = []
        """Every command of every link, in order of arrival."""

    async def connect(self, *, after_death: bool) -> Connection:
        """See `transport.base.Transport`."""
        del after_death
        return await SocketLink.connect(self.open(), "agentspeed")

    async def close(self) -> None:
        """Ends every link. The threads end with their links."""
        await anyio.to_thread.run_sync(self._stop)

    def open(self) -> socket.socket:
        """A new link; the engine's side of it runs in a thread."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        link = ScriptedLink(
            ours,
            self._model,
            self.files,
            max_branches=self.max_branches,
            welcome=self._welcome,
            heard=self.commands.append,
        )
        self._links.append(link)
        return theirs

    def _stop(self) -> None:
        for link in self._links:
            link.stop()

    @property
    def live_branches(self) -> int:
        """Branches that were opened or forked and not closed: 0 when nothing leaked."""
        return sum(len(link.branches) for link in self._links)

    def _welcome(self, request: int) -> wire.Welcome:
        """What this engine says of itself."""
        return wire.Welcome(
            request=request,
            protocol=wire.PROTOCOL,
            engine="scripted",
            model=str(self._folder),
            vocab_size=self._model.vocab_size,
            context_limit=self._model.context_limit,
            page_tokens=_PAGE_TOKENS,
            pages=0,
            host_slots=0,
            pid=os.getpid(),
            limits={"max_branches": self.max_branches},
        )
