"""What `agentspeed top` does: finds engines, looks at them once or each second, and survives their end."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import final

from rich.console import Console, Group
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from agentspeed import errors
from agentspeed.backends import watching
from agentspeed.cli.picturing import Frame, as_data, drawn, shares

EXIT_GONE = 3
"""Every engine that was watched has ended."""
_LINES_AROUND = 7
"""Of an engine's block, beside its branches."""
_SECONDS = 1.0
_AGAIN_SECONDS = 2.0
_REMEDY = "Start one (a session, or `python -m agentspeed_engine.run`), or give the path of its socket."


@final
class Top:
    """One watch in a terminal. `socket` alone, or every engine of this user."""

    def __init__(self, socket: Path | None, *, branches: int | None, as_json: bool, console: Console | None = None,
                 seconds: float = _SECONDS) -> None:
        self._socket = None if socket is None else socket.resolve()
        self._branches = branches
        self._as_json = as_json
        self._console = console or Console()
        self._seconds = seconds
        self._watchers: dict[Path, watching.Watcher] = {}
        self._last: dict[Path, Frame] = {}
        self._ended: dict[Path, str] = {}
        """What was said of engines that ended meanwhile, or could not be watched."""
        self._again: dict[Path, float] = {}
        """When to try them again: one may have hung, another may have been started at the same socket."""

    def once(self) -> None:
        """One frame. Raises `ConnectFailed` when there is no engine that answers."""
        try:
            self._print(self._found())
        finally:
            self._close()
        self._tell_ended()

    def watch(self) -> int:
        """Frames until Ctrl-C (0), or until every engine watched has ended (3). Raises `ConnectFailed` when there is
        none at the start."""
        try:
            frames = self._found()
            if self._as_json or not self._console.is_terminal or self._console.is_dumb_terminal:
                while frames:
                    self._print(frames)
                    time.sleep(self._seconds)
                    frames = self._frames()
            else:
                self._live(frames)
        except KeyboardInterrupt:
            return 0
        finally:
            self._close()
        self._tell_ended()
        return EXIT_GONE

    def _tell_ended(self) -> None:
        for said in self._ended.values():
            print(said, file=sys.stderr)

    def _live(self, frames: list[Frame]) -> None:
        with Live(console=self._console, screen=True, auto_refresh=False) as live:
            while frames:
                live.update(self._screenful(frames), refresh=True)
                time.sleep(self._seconds)
                frames = self._frames()

    def _screenful(self, frames: list[Frame]) -> Group:
        """Every engine has its share of the lines; notes and hint are always there."""
        console = self._console
        notes = [Text(said, style="red") for said in list(self._ended.values())[-3:]]
        below = console.render_lines(Group(*notes, Text("Ctrl-C ends", style="dim")), pad=False)
        blocks = [console.render_lines(drawn(frame, console.width), pad=False) for frame in frames]
        lines: list[list[Segment]] = []
        for block, share in zip(blocks, shares([len(block) for block in blocks], console.height - len(below)),
                                strict=True):
            cut = len(block) > share > 2
            lines += block[: share - cut]
            if cut:
                lines.append([Segment(f"… {len(block) - share + 1} lines more of this engine")])
        return Group(*(Segments([*line, Segment.line()]) for line in [*lines, *below]))

    def _found(self) -> list[Frame]:
        frames = self._frames()
        if not frames:
            if self._ended:  # each says what to do
                raise errors.ConnectFailed(" ".join(self._ended.values()))
            raise errors.ConnectFailed("No engine of yours is running.", remedy=_REMEDY)
        return frames

    def _frames(self) -> list[Frame]:
        """Everyone who answers. Who does not is remembered in `_ended`, and asked again after a while."""
        self._connect()
        frames: list[Frame] = []
        for path, watcher in list(self._watchers.items()):
            try:
                picture = watcher.look(self._most())
            except (errors.EngineDied, errors.ConnectFailed) as death:
                del self._watchers[path]
                self._again[path] = time.monotonic() + _AGAIN_SECONDS
                self._ended[path] = f"{watcher.welcome.model}, process {watcher.welcome.pid}: {death}"
                continue
            before = self._last.get(path)
            frames.append(Frame(str(path), watcher.welcome, picture, None if before is None else before.picture))
        self._last = {Path(frame.socket): frame for frame in frames}
        return frames

    def _connect(self) -> None:
        paths = [self._socket] if self._socket is not None else watching.sockets(known=self._watchers)
        for path in paths:
            if path in self._watchers or time.monotonic() < self._again.get(path, 0.0):
                continue
            try:
                self._watchers[path] = watching.Watcher(path, patient=path not in self._ended)
            except (errors.EngineDied, errors.ConnectFailed) as error:
                self._again[path] = time.monotonic() + _AGAIN_SECONDS
                _ = self._ended.setdefault(path, str(error))
            else:
                _ = self._ended.pop(path, None)

    def _most(self) -> int:
        """Branches to ask of each engine: what was wanted, or what the screen has room for."""
        if self._branches is not None:
            return self._branches
        if self._as_json or not self._console.is_terminal:
            return 200
        return max(5, self._console.height // max(1, len(self._watchers)) - _LINES_AROUND)

    def _print(self, frames: list[Frame]) -> None:
        if self._as_json:
            print(json.dumps({"engines": [as_data(frame) for frame in frames]}), flush=True)
        else:
            self._console.print(*(drawn(frame, self._console.width) for frame in frames))

    def _close(self) -> None:
        for watcher in self._watchers.values():
            watcher.close()
        self._watchers.clear()
