"""Counts in messages, as people say them."""

from __future__ import annotations


def counted(count: int, word: str, several: str | None = None) -> str:
    """ "1 page", "2 pages". `several`: the plural, where it is not the word with an s."""
    return f"{count} {word if count == 1 else several or f'{word}s'}"
