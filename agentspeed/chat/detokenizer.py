"""Ids back to text while they arrive: by the bytes of tokens, so that a character is whole or waits.

A library's decoder reads a text anew with each id and may change its mind about bytes that it has shown. Here every
token stands for fixed bytes, and these are read as UTF-8 in order; bytes that no character has become U+FFFD.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE: Final = 6
"""Characters of a byte-fallback token: `<0x0A>`."""


@final
@dataclass(frozen=True, slots=True)
class TokenReading:
    """How one vocabulary's tokens are read. `tokens` has the bytes of each id; None where the library must decode."""

    tokens: tuple[bytes, ...] | None
    strip: int
    """Spaces at the beginning of a text that are none of it."""
    library: Tokenizer


@final
class IncrementalText:
    """Feeds ids, yields whole characters only: bytes of an unfinished one wait for the next id, or for the end."""

    def __init__(self, decoding: TokenReading) -> None:
        self._decoding = decoding
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waits = False
        """Bytes of a character that is not whole."""
        self._strip = decoding.strip
        self._ids: list[int] = []
        self._told = ""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is certain now. An id that the vocabulary does not have stands for nothing."""
        tokens = self._decoding.tokens
        if tokens is None:
            return self._by_library(ids)
        data = b"".join([tokens[number] for number in ids if 0 <= number < len(tokens)])
        if not self._waits and data.isascii():  # nearly always: nothing to put together
            text = data.decode("ascii")
            return self._stripped(text) if self._strip else text
        text = self._characters.decode(data)
        self._waits = bool(self._characters.getstate()[0])
        return self._stripped(text)

    def finish(self) -> str:
        """What waited, now that nothing follows: U+FFFD for a character that was not finished."""
        if self._decoding.tokens is not None:
            return self._stripped(self._characters.decode(b"", final=True))
        rest = self._whole()[len(self._told) :]
        self._told += rest
        return rest

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text

    def _by_library(self, ids: Sequence[int]) -> str:
        """For vocabularies whose tokens depend on their neighbours: what was told stays told."""
        self._ids += ids
        whole = self._whole()
        known = whole.rstrip("\ufffd") if whole.endswith("\ufffd") else whole
        if not known.startswith(self._told):
            return ""
        fresh = known[len(self._told) :]
        self._told += fresh
        return fresh

    def _whole(self) -> str:
        return str(self._decoding.library.decode(self._ids, skip_special_tokens=False))


def decoding(library: Tokenizer, source: str, added: Mapping[int, str]) -> TokenReading:
    """Of the tokenizer whose file is `source`; `added` are the tokens that stand for themselves."""
    raw: dict[str, Any] = json.loads(source)
    steps = _steps(raw.get("decoder"))
    if steps is None:
        return TokenReading(None, 0, library)
    vocabulary = library.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, number in vocabulary.items():
        tokens[number] = added[number].encode() if number in added else steps.data(piece)
    return TokenReading(tuple(tokens), steps.strip, library)


@final
@dataclass(slots=True)
class _Steps:
    """What a decoder does to each token."""

    byte_level: bool = False
    byte_fallback: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    strip: int = 0

    def data(self, piece: str) -> bytes:
        if self.byte_level:
            table = _byte_level()
            return b"".join(table.get(character, character.encode()) for character in piece)
        if self.byte_fallback and len(piece) == _BYTE and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass  # a word that only looks like one
        for old, new in self.replaced:
            piece = piece.replace(old, new)
        return piece.encode()


def _steps(decoder: Any) -> _Steps | None:
    """None for a decoder under which a token's text depends on where it stands."""
    steps = _Steps()
    for step in decoder.get("decoders", []) if _kind(decoder) == "Sequence" else [decoder]:
        match step:
            case {"type": "ByteLevel"}:
                steps.byte_level = True
            case {"type": "ByteFallback"}:
                steps.byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                steps.replaced += ((old, new),)
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                steps.strip += start
            case {"type": "Metaspace", "replacement": str(mark)}:
                steps.replaced += ((mark, " "),)
                steps.strip += 0 if step.get("prepend_scheme", "always") == "never" else 1
            case _:
                return None
    return steps


def _kind(decoder: Any) -> object:
    return decoder.get("type") if isinstance(decoder, dict) else None


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, bytes]:
    """Character to byte of the byte-level alphabet (Radford et al. 2019): printable bytes stand for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}
