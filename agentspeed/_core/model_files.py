"""Finds a model's folder, and makes the codec of one, once as long as its files stay as they are."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from agentspeed.chat.codec import ChatCodec
from agentspeed.transport.base import wire

NANO = Path(__file__).parent.parent / "models" / "nano"
"""The model that ships with the package."""


def codec_of(folder: Path) -> ChatCodec:
    """The folder's codec; the same one until a file of it changes, for sessions come by the thousand. Raises what
    `ChatCodec` raises."""
    files = (folder / name for name in wire.TEXT_FILES)
    stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None for path in files)
    return _cached_codec(folder.resolve(), stamps)


@lru_cache(maxsize=8)
def _cached_codec(folder: Path, stamps: tuple[tuple[int, int] | None, ...]) -> ChatCodec:
    return ChatCodec(folder)
