"""What `agentspeed top` does: finds engines, looks at them once or each second, and survives their hanging and end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

from rich.console import Console, Group
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from agentspeed import errors
from agentspeed.cli.terminal_text import printable
from agentspeed.cli.top_rendering import Frame, as_data, drawn, shares
from agentspeed.transport import stats_client

EXIT_GONE = 3
"""Every engine that was watched has ended."""
_LINES_AROUND = 7
"""Of an engine's block, beside its branches."""
_SECONDS = 1.0
_AGAIN_SECONDS = 2.0
_SOON_SECONDS = 0.5
"""An engine answers between two callbacks of its loop, which never waits for a step: a frame waits no longer for it."""
_START_SECONDS = (_SOON_SECONDS, 1.0, 2.0, 5.0)
"""Until one answers, at the start: later ones are for a machine that is busy."""
_SILENT_SECONDS = 1.0
"""From then on it is said that an engine does not answer."""
_REMEDY = "Start one (a session, or `agentspeed engine`), or give the path of its socket."


@final
class Top:
    """One watch in a terminal. `socket` alone, or every engine of this user."""

    def __init__(
        self,
        socket: Path | None,
        *,
        branches: int | None,
        as_json: bool,
        console: Console | None = None,
        seconds: float = _SECONDS,
    ) -> None:
        self._socket = None if socket is None else socket.resolve()
        self._branches = branches
        self._as_json = as_json
        self._console = console or Console()
        self._seconds = seconds
        self._watchers: dict[Path, stats_client.Watcher] = {}
        self._ended: dict[Path, str] = {}
        """What was said of engines that ended meanwhile, or could not be watched."""
        self._again: dict[Path, float] = {}
        """When to try them again: another may have been started at the same socket."""

    def once(self) -> None:
        """One frame. Raises `ConnectFailed` when there is no engine that answers."""
        try:
            self._print(self._found(_START_SECONDS[-1:]))
            self._tell()
        finally:
            self._close()

    def watch(self) -> int:
        """Frames until Ctrl-C (0), or until every engine watched has ended (3). Raises `ConnectFailed` when none
        answers at the start."""
        try:
            frames = self._on_time(self._found(_START_SECONDS))
            if self._as_json or not self._console.is_terminal or self._console.is_dumb_terminal:
                for frame in frames:
                    self._print(frame)
            else:
                with Live(console=self._console, screen=True, auto_refresh=False) as live:
                    for frame in frames:
                        live.update(self._screenful(frame), refresh=True)
            self._tell()
        except KeyboardInterrupt:
            return 0
        finally:
            self._close()
        return EXIT_GONE

    def _on_time(self, frames: list[Frame]) -> Iterator[list[Frame]]:
        """Frame after frame until every engine has ended; one that only hangs holds up none."""
        due = time.monotonic()
        while self._watchers:
            yield frames
            due = max(due + self._seconds, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            frames = self._frames(_SOON_SECONDS)

    def _notes(self) -> list[str]:
        """Of engines of which there is nothing to draw."""
        mute = [
            f"What listens at {path} has not answered for {watcher.silent:.0f} s."
            for path, watcher in self._watchers.items()
            if watcher.seen is None and watcher.silent >= _SILENT_SECONDS
        ]
        return [printable(note) for note in (*self._ended.values(), *mute)]

    def _tell(self) -> None:
        for note in self._notes():
            print(note, file=sys.stderr)

    def _screenful(self, frames: list[Frame]) -> Group:
        """Every engine has its share of the lines; notes and hint are always there."""
        console = self._console
        notes = [Text(note, style="red") for note in self._notes()[-3:]]
        below = console.render_lines(Group(*notes, Text("Ctrl-C ends", style="dim")), pad=False)
        blocks = [console.render_lines(drawn(frame, console.width), pad=False) for frame in frames]
        lines: list[list[Segment]] = []
        for block, share in zip(
            blocks, shares([len(block) for block in blocks], console.height - len(below)), strict=True
        ):
            cut = len(block) > share > 2
            lines += block[: share - cut]
            if cut:
                lines.append([Segment(f"… {len(block) - share + 1} lines more of this engine")])
        return Group(*(Segments([*line, Segment.line()]) for line in [*lines, *below]))

    def _found(self, patience: Sequence[float]) -> list[Frame]:
        """The first frames: what there is once some engine has answered."""
        for seconds in patience:
            if frames := self._frames(seconds):
                return frames
        if notes := self._notes():  # each says what to do
            raise errors.ConnectFailed(" ".join(notes))
        raise errors.ConnectFailed("No engine of yours is running.", remedy=_REMEDY)

    def _frames(self, patience: float) -> list[Frame]:
        """A frame for each engine that has answered; an old one where no answer came within `patience` seconds."""
        self._connect()
        for watcher in self._watchers.values():
            watcher.ask(self._most())
        for path, watcher in list(self._watchers.items()):
            watcher.wait(patience)
            if watcher.ended is not None:
                self._lost(path, watcher, watcher.ended)
            elif watcher.welcome is not None:
                _ = self._ended.pop(path, None)
        return [frame for watcher in self._watchers.values() if (frame := _frame_of(watcher)) is not None]

    def _lost(self, path: Path, watcher: stats_client.Watcher, why: Exception) -> None:
        if not isinstance(why, errors.EngineDied | errors.ConnectFailed):
            raise why
        del self._watchers[path]
        self._again[path] = time.monotonic() + _AGAIN_SECONDS
        if watcher.welcome is not None:
            self._ended[path] = f"{watcher.welcome.model}, process {watcher.welcome.pid}: {why}"
        else:
            _ = self._ended.setdefault(path, str(why))  # what ended before it says more than that it is not back

    def _connect(self) -> None:
        paths = [self._socket] if self._socket is not None else stats_client.sockets(known=self._watchers)
        for path in paths:
            if path not in self._watchers and time.monotonic() >= self._again.get(path, 0.0):
                self._watchers[path] = stats_client.Watcher(path, self._most())

    def _most(self) -> int:
        """Branches to ask of each engine: what was wanted, or what the screen has room for."""
        if self._branches is not None:
            return self._branches
        if self._as_json or not self._console.is_terminal:
            return 200
        return max(5, self._console.height // max(1, len(self._watchers)) - _LINES_AROUND)

    def _print(self, frames: list[Frame]) -> None:
        if self._as_json:
            print(json.dumps({"engines": [as_data(frame) for frame in frames], "notes": self._notes()}), flush=True)
        else:
            self._console.print(*(drawn(frame, self._console.width) for frame in frames))

    def _close(self) -> None:
        for watcher in self._watchers.values():
            watcher.close()
        self._watchers.clear()


def _frame_of(watcher: stats_client.Watcher) -> Frame | None:
    if watcher.welcome is None or watcher.seen is None:
        return None
    (picture, before), silent = watcher.seen, watcher.silent
    if silent < _SILENT_SECONDS:
        return Frame(str(watcher.path), watcher.welcome, picture, before)
    return Frame(str(watcher.path), watcher.welcome, picture, silent=silent)
