"""The border to recordings of engines: what the engine refuses to replay becomes a public error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import final

from agentspeed.errors import InvalidRequest
from agentspeed.transport.error_map import converted
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.serve.crashes import folder, left
from agentspeed_engine.serve.replay import NodeLine, Replay, ReplayDiffers, Step, nodes_of

__all__ = ["NodeLine", "Recording", "ReplayDiffers", "Step", "crashes"]


@final
class Recording:
    """A recording that is replayed once."""

    def __init__(self, path: Path) -> None:
        """Raises `InvalidRequest` when there is none at `path` that this version can read."""
        with converted():
            self._replay = Replay(path)

    def steps(self) -> Iterator[Step]:
        """Raises `ReplayDiffers` where the replay is not the recorded run, and `InvalidRequest` where it is damaged."""
        with converted():
            yield from self._replay.steps()

    def about(self) -> str:
        """What was recorded, in one line."""
        header = self._replay.header
        names = "with real ids and names" if header.content else "without content"
        return f"{header.model}, process {header.pid}, agentspeed {header.engine}, {names}"

    def picture(self) -> wire.Picture:
        """The replayed engine as it stands now."""
        return self._replay.core.picture(wire.Look(request=0, branches=wire.MAX_LOOK), self._replay.now)

    def nodes(self) -> list[NodeLine]:
        """Every node of the tree, as it stands now."""
        return nodes_of(self._replay.core.world)

    @property
    def notes(self) -> list[str]:
        """What a reader must know: a torn end, missing inputs."""
        return self._replay.notes

    @property
    def compared(self) -> int:
        """Digests found equal."""
        return self._replay.compared

    @property
    def broke(self) -> str:
        """How the recorded engine broke; empty when it did not."""
        replay = self._replay
        if not replay.broke:
            return ""
        where = (
            "the replayed core breaks at the same input"
            if replay.reproduced
            else "outside of the scheduling core, which replays without it"
        )
        return f"The recorded engine broke with {replay.broke}: {where}."


def crashes() -> list[tuple[Path, str]]:
    """What engines of this user that ended badly left, oldest first: where, and of what (or why it cannot be read)."""
    place = folder(os.environ)
    found: list[tuple[Path, str]] = []
    for path in [] if place is None else left(place):
        try:
            found.append((path, Recording(path).about()))
        except InvalidRequest as error:
            found.append((path, str(error)))
    return found
