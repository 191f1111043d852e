"""Keeps stop strings out of a turn's text: what may become one is held back until it is one or cannot be one."""

from __future__ import annotations

from typing import final


@final
class StopFilter:
    """For one turn. The engine ends the turn at the token that completes a stop string; this cuts inside that token."""

    __slots__ = ("_held", "_include", "_old", "_stops", "stopped")

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        """`include`: the stop string itself is text of the turn; only what its token wrote after it is not."""
        self._stops = stops
        self._include = include
        self._held = ""
        self._old = 0
        """How many characters at the beginning of `_held` an earlier turn wrote."""
        self.stopped = False
        """Whether a stop string was met: nothing comes out any more."""

    def go_on_from(self, text: str) -> str:
        """What an earlier turn wrote before this one, up to where a stop string may have begun. A stop string that ends
        in it is none: that turn did not ask for it."""
        keep = max((self._begun(text, stop) for stop in self._stops), default=0)
        self._held, self._old = text[len(text) - keep :], keep
        return text[: len(text) - keep]

    def feed(self, text: str) -> str:
        """What is certain to be text of the message."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        old, text = self._old, self._held + text
        found = [
            (place, place + len(stop))
            for stop in self._stops
            if (place := text.find(stop, max(0, old - len(stop) + 1))) >= 0
        ]
        if found:
            self.stopped, self._held, self._old = True, "", 0
            return text[: min(end for _, end in found) if self._include else min(start for start, _ in found)]
        keep = max(self._begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        self._old = max(0, keep + old - len(text))
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held, self._old = self._held, "", 0
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many characters at the end of the text begin the stop string."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
