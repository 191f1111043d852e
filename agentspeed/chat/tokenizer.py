"""Text to ids and back, for one model folder: content never becomes control tokens, characters never break."""

from __future__ import annotations

import re
from functools import cached_property
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Final, final

from agentspeed.chat.detokenizer import IncrementalText as IncrementalText
from agentspeed.chat.detokenizer import decoding
from agentspeed.chat.environment import read_json, read_text, token_text
from agentspeed.chat.tiktoken_vocabulary import FILE as TIKTOKEN_FILE
from agentspeed.chat.tiktoken_vocabulary import tokenizer_json
from agentspeed.errors import ExtraMissing, InvalidRequest, ModelBroken

_IN_BRACKETS: Final = re.compile(r"[<\[].+[>\]]|｜[^\s｜]+｜", re.DOTALL)
"""Tells a family's control tokens from the words and runs of spaces that also are added to vocabularies."""


@final
class TextTokenizer:
    """Two views of one tokenizer.json: template text may name control tokens, content may not."""

    def __init__(self, folder: Path) -> None:
        """Raises `ModelBroken` when the folder has no usable tokenizer.json, or `tiktoken.model` in its place."""
        try:
            from tokenizers import AddedToken, Tokenizer
        except ImportError as error:
            raise ExtraMissing(
                "Local models need the tokenizers package.", remedy="Install agentspeed[engine]."
            ) from error
        path = folder / "tokenizer.json"
        if not path.is_file() and (folder / TIKTOKEN_FILE).is_file():
            path = folder / TIKTOKEN_FILE
        elif not path.is_file():
            raise ModelBroken(f"{folder} has no tokenizer.json.", remedy="Give a complete model folder.")
        source = tokenizer_json(folder) if path.name == TIKTOKEN_FILE else read_text(path)
        try:
            self._template: Tokenizer = Tokenizer.from_str(source)
            self._content: Tokenizer = Tokenizer.from_str(source)
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise ModelBroken(f"{path} is not a tokenizer: {error}.", remedy="Export it anew.") from error
        # Families mark some of their control tokens as special and others not (`<｜User｜>`): content may name neither.
        added = self._content.get_added_tokens_decoder()
        controls = {
            number: token.content
            for number, token in added.items()
            if token.special or _IN_BRACKETS.fullmatch(token.content)
        }
        self._controls = frozenset(controls)
        _ = self._content.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in controls.values()]
        )
        self._content.encode_special_tokens = True
        self._decoding = decoding(self._template, source, {number: token.content for number, token in added.items()})
        self.start_ids = self._starts(folder)
        """What a text without a template begins with: the tokenizer's own first ids, or none."""

    def _starts(self, folder: Path) -> tuple[int, ...]:
        read = self._template.encode("a", add_special_tokens=True)
        leading = tuple(takewhile(lambda pair: pair[1], zip(read.ids, read.special_tokens_mask, strict=True)))
        if leading:
            return tuple(number for number, _ in leading)
        config = folder / "tokenizer_config.json"
        settings = read_json(config) if config.is_file() else {}
        first = self.token_id(token_text(settings.get("bos_token"))) if settings.get("add_bos_token") is True else None
        return () if first is None else (first,)

    def template_ids(self, text: str) -> list[int]:
        """Ids of text that a chat template wrote: control tokens are recognised."""
        return self.read_template(text)[0]

    def content_ids(self, text: str) -> list[int]:
        """Ids of what a user, a tool or a document said: control tokens are spelt out as plain text.

        Raises `InvalidRequest` for text that is no UTF-8, and for what the vocabulary has no token for."""
        if not text:
            return []
        try:
            return list(self._content.encode_batch([text], add_special_tokens=False)[0].ids)
        except Exception as error:  # the library raises plain Exception
            raise _unreadable(text, error) from error

    def read_template(self, text: str) -> tuple[list[int], list[tuple[int, int, int]]]:
        """The ids of a template's text, and where control tokens stand in it: (start, end, id)."""
        try:
            read = self._template.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise _unreadable(text, error) from error
        found = [
            (start, end, number)
            for number, (start, end) in zip(read.ids, read.offsets, strict=True)
            if number in self._controls
        ]
        return list(read.ids), found

    def token_id(self, token: str) -> int | None:
        """The id of a control token; None when the vocabulary has no such token."""
        found: int | None = self._template.token_to_id(token)
        return found

    def decoder(self) -> IncrementalText:
        """A fresh decoder for one message."""
        return IncrementalText(self._decoding)

    @cached_property
    def fingerprint(self) -> str:
        """Tells vocabularies apart: a digest of every token with its id. Ids of one mean nothing to another."""
        vocabulary = sorted(self._template.get_vocab(with_added_tokens=True).items())
        return sha256("".join(f"{token}\0{number}\0" for token, number in vocabulary).encode()).hexdigest()

    def text(self, ids: list[int]) -> str:
        """All ids at once, control tokens shown."""
        decoder = self.decoder()
        return decoder.feed(ids) + decoder.finish()


def _unreadable(text: str, error: Exception) -> InvalidRequest:
    shown = repr(text if len(text) < 80 else text[:80] + "...")
    return InvalidRequest(
        f"This model's tokenizer cannot read {shown}: {str(error).rstrip('.')}.",
        remedy="Leave out what it has no token for; half a character (a lone surrogate) is none.",
    )
