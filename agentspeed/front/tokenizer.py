"""Text to ids and back, for one model folder: content never becomes control tokens, characters never break."""

from __future__ import annotations

import re
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, final

from agentspeed.errors import ExtraMissing, ModelBroken

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_IN_BRACKETS = re.compile(r"[<\[].+[>\]]", re.DOTALL)
"""Tells a family's control tokens from the words and runs of spaces that also are added to vocabularies."""


@final
class TextTokenizer:
    """Two views of one tokenizer.json: template text may name control tokens, content may not."""

    def __init__(self, folder: Path) -> None:
        """Raises `ModelBroken` when the folder has no usable tokenizer.json."""
        try:
            from tokenizers import AddedToken, Tokenizer
        except ImportError as error:
            raise ExtraMissing("Local models need the tokenizers package.",
                               remedy="Install agentspeed[engine].") from error
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelBroken(f"{folder} has no tokenizer.json.", remedy="Give a complete model folder.")
        try:
            self._template: Tokenizer = Tokenizer.from_file(str(path))
            self._content: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise ModelBroken(f"{path} is not a tokenizer: {error}.", remedy="Export it anew.") from error
        # Families mark some of their control tokens as special and others not (`<｜User｜>`): content may name neither.
        added = self._content.get_added_tokens_decoder()
        controls = {number: token.content for number, token in added.items()
                    if token.special or _IN_BRACKETS.fullmatch(token.content)}
        self._controls = frozenset(controls)
        _ = self._content.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in controls.values()])
        self._content.encode_special_tokens = True

    def template_ids(self, text: str) -> list[int]:
        """Ids of text that a chat template wrote: control tokens are recognised."""
        return list(self._template.encode(text, add_special_tokens=False).ids)

    def content_ids(self, text: str) -> list[int]:
        """Ids of what a user, a tool or a document said: control tokens are spelt out as plain text."""
        return list(self._content.encode_batch([text], add_special_tokens=False)[0].ids) if text else []

    def read_template(self, text: str) -> tuple[list[int], list[tuple[int, int, int]]]:
        """The ids of a template's text, and where control tokens stand in it: (start, end, id)."""
        read = self._template.encode(text, add_special_tokens=False)
        found = [(start, end, number) for number, (start, end) in zip(read.ids, read.offsets, strict=True)
                 if number in self._controls]
        return list(read.ids), found

    def token_id(self, token: str) -> int | None:
        """The id of a control token; None when the vocabulary has no such token."""
        found: int | None = self._template.token_to_id(token)
        return found

    def decoder(self) -> IncrementalText:
        """A fresh decoder for one message."""
        return IncrementalText(self._template)

    @cached_property
    def fingerprint(self) -> str:
        """Tells vocabularies apart: a digest of every token with its id. Ids of one mean nothing to another."""
        vocabulary = sorted(self._template.get_vocab(with_added_tokens=True).items())
        return sha256("".join(f"{token}\0{number}\0" for token, number in vocabulary).encode()).hexdigest()

    def text(self, ids: list[int]) -> str:
        """All ids at once, control tokens shown."""
        return str(self._template.decode(ids, skip_special_tokens=False))


@final
class IncrementalText:
    """Feeds ids, yields whole characters only: bytes of an unfinished one wait for the next id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)

    def feed(self, ids: list[int]) -> str:
        pieces = [self._stream.step(self._tokenizer, number) for number in ids]
        return "".join(piece for piece in pieces if piece)
