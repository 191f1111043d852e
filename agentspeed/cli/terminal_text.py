"""What may go to a terminal: names that clients chose, made harmless, and signs that its encoding lacks, replaced."""

from __future__ import annotations

import codecs
import io
from typing import Final, TextIO

_REPLACE: Final = "agentspeed-ascii"
_ASCII: Final = {"█": "#", "▓": "=", "▒": "-", "░": ".", "├": "|", "│": "|", "└": "`", "…": "~", "·": "-"}
"""What is drawn here, for a terminal that has nothing else."""


def printable(text: str) -> str:
    """In one line, nothing in it that could move the cursor, hide or reorder what is there: a client, a model or a web
    page may have written it."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def encodable(stream: TextIO) -> None:
    """From now on what this output cannot encode is drawn in ASCII, or a question mark, instead of ending the
    command."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        codecs.register_error(_REPLACE, _replaced)
        stream.reconfigure(errors=_REPLACE)


def decodable(stream: TextIO) -> None:
    """From now on a line of this input that cannot be decoded is refused like any other wrong text, when it is used."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="surrogateescape")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(one, "?") for one in error.object[error.start : error.end]), error.end
