"""Keeps stop strings out of a turn's text: what may become one is held back until it is one or cannot be one."""

from __future__ import annotations

from typing import final


@final
class StopFilter:
    """For one turn. The engine ends the turn at the token that completes a stop string; this cuts inside that token."""

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False
        """Whether a stop string was met: nothing comes out any more."""

    def feed(self, text: str) -> str:
        """What is certain to be text of the turn."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max(self._begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many characters at the end of the text begin the stop string."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
