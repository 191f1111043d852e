"""The tokens of a `tiktoken.model` (Kimi, Moonlight) by their bytes, with the control tokens of its configuration."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import final

from agentspeed_engine.errors import EngineFault

FILE = "tiktoken.model"
_CONTROLS = 256
"""Ids after the vocabulary's own that are control tokens; those without a name are reserved."""


@final
@dataclass(frozen=True, slots=True)
class TiktokenRanks:
    """Ids by the bytes of a token, and by the name of a control token."""

    ranks: dict[bytes, int]
    controls: dict[str, int]

    @property
    def ids(self) -> int:
        """One more than the highest id."""
        return 1 + max((*self.ranks.values(), *self.controls.values()), default=-1)


def read(folder: Path) -> TiktokenRanks:
    """Raises `EngineFault` (bad_tokenizer) for files that cannot be read so."""
    try:
        lines = [line.split() for line in (folder / FILE).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        settings = folder / "tokenizer_config.json"
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        names = {int(number): str(held["content"]) for number, held in named.get("added_tokens_decoder", {}).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineFault(
            "bad_tokenizer",
            f"{folder / FILE} cannot be read: {error}.",
            "Stop strings and grammars need it, and tokenizer_config.json beside it; download both again.",
        ) from error
    first = len(ranks)
    last = max([first + _CONTROLS - 1, *names])
    controls = {names.get(number, f"<|reserved_token_{number}|>"): number for number in range(first, last + 1)}
    return TiktokenRanks(ranks, controls)
