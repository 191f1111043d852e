"""The bytes of every token, from a model folder's tokenizer: for stop strings and grammar masks, never text."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, final

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec import tiktoken_ranks

_Untyped: Any = LLTokenizer
"""Its types do not know `from_tiktoken`."""
_WHOLE = r"(?s:.)+"
"""Where a text is cut into pieces: that matters for tokens that a grammar forces, and the engine draws each of them."""


@final
class Vocabulary:
    """What turns with stop strings and grammars need. It is made on first use, or ahead of it by `load`."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._path = folder / "tokenizer.json"
        self._folder = folder
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
    def _tiktoken(self) -> tiktoken_ranks.TiktokenRanks | None:
        """Where that is the folder's tokenizer."""
        if self._path.is_file() or not (self._folder / tiktoken_ranks.FILE).is_file():
            return None
        return tiktoken_ranks.read(self._folder)

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
        if self._tiktoken is not None:
            return self._by_id(self._tiktoken)
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

    def _by_id(self, given: tiktoken_ranks.TiktokenRanks) -> list[bytes]:
        found = [b""] * max(self.vocab_size, given.ids)
        for piece, number in given.ranks.items():
            found[number] = piece
        for name, number in given.controls.items():
            found[number] = name.encode()
        return found[: self.vocab_size]

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
        if (given := self._tiktoken) is not None:
            made: LLTokenizer = _Untyped.from_tiktoken(
                encoder=given.ranks,
                special_tokens=given.controls,
                pattern=_WHOLE,
                eos_token=eos if eos is not None else given.ids - 1,
                n_vocab=max(self.vocab_size, given.ids),
            )
            return made
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
