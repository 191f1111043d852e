"""The bytes of every token, from a model folder's tokenizer.json: for stop strings and grammar masks, never text."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, final

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from agentspeed_engine.errors import EngineFault


@final
class Vocabulary:
    """What turns with stop strings and grammars need. It is made on first use, or ahead of it by `load`."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._path = folder / "tokenizer.json"
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids

    def load(self) -> str:
        """Makes everything ready, because no other thread runs meanwhile: a vocabulary of 128 thousand ids holds the
        interpreter's lock for the better part of a second. Returns why it cannot be used, or nothing."""
        try:
            _ = self.token_bytes, self.llguidance
        except EngineFault as fault:
            return fault.message
        return ""

    @cached_property
    def _text(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8")
        except OSError as error:
            raise EngineFault(
                "bad_tokenizer",
                f"{self._path} cannot be read: {error}.",
                "Stop strings and grammars need the model's tokenizer.json.",
            ) from error

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """By id; ids the tokenizer does not define are empty."""
        try:
            tokenizer = Tokenizer.from_str(self._text)
            raw: dict[str, Any] = json.loads(self._text)
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise self._broken(error) from error
        byte_level = "ByteLevel" in json.dumps([raw.get("decoder"), raw.get("pre_tokenizer")])
        special = {token["id"] for token in raw.get("added_tokens", ())}
        table = _byte_level_table()
        found = [b""] * self.vocab_size
        for piece, number in tokenizer.get_vocab(with_added_tokens=True).items():
            if number >= self.vocab_size:
                continue
            if number in special:
                found[number] = piece.encode()
            elif byte_level:
                found[number] = b"".join(table.get(char, char.encode()) for char in piece)
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                found[number] = bytes([int(piece[3:5], 16)])
            else:
                found[number] = piece.replace("\u2581", " ").encode()
        return found

    def _broken(self, error: Exception) -> EngineFault:
        return EngineFault(
            "bad_tokenizer",
            f"{self._path} is not a tokenizer: {error}.",
            "Take the tokenizer.json the model was published with.",
        )

    @cached_property
    def _tokenizer_ids(self) -> int:
        """One more than the highest id of tokenizer.json."""
        try:
            ids = Tokenizer.from_str(self._text).get_vocab(with_added_tokens=True).values()
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise self._broken(error) from error
        return 1 + max(ids, default=0)

    @cached_property
    def llguidance(self) -> LLTokenizer:
        """The same vocabulary as llguidance's masks see it."""
        eos = list(self.eos_ids) or None
        try:
            # A tokenizer may have more ids than the model draws from (those of images, say), and one more than the
            # vocabulary is not what a mask can be made for: masks are cut to what is drawn from.
            return LLTokenizer(self._text, n_vocab=max(self.vocab_size, self._tokenizer_ids), eos_token=eos)
        except ValueError as error:
            raise self._broken(error) from error


def _byte_level_table() -> dict[str, bytes]:
    """Character to byte of the byte-level alphabet (Radford et al. 2019): printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    shifted = 0
    for byte in range(256):
        if byte not in printable:
            table[chr(256 + shifted)] = bytes([byte])
            shifted += 1
    return table
