"""`/v1/model/files`: what a remote session needs of the model, by digest: tokenizer, template, configuration; no weights."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final

NAMES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


@lru_cache(maxsize=4)
def manifest(folder: Path) -> dict[str, str]:
    """Names of the files that the folder has, and the SHA-256 of each, as they were when the server started."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES if (folder / name).is_file()
    }


def content(folder: Path, digest: str) -> bytes | None:
    """The file with this digest; None when there is none."""
    for name, known in manifest(folder).items():
        if known == digest:
            return (folder / name).read_bytes()
    return None
