"""Finds a model's folder, and makes the codec of one, once as long as its files stay as they are."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from agentspeed import errors
from agentspeed.front.codec import ChatCodec

NANO = Path(__file__).parent.parent / "models" / "nano"
"""The model that ships with the package."""
_CODEC_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)


def resolve(model: str | os.PathLike[str]) -> Path:
    """A local folder as it is; a repository id through the hub's cache. Raises what to do when there is neither."""
    text = os.fspath(model)
    try:
        folder = Path(text).expanduser()
    except RuntimeError as error:  # `~name`, and nobody is called so
        raise errors.ModelBroken(
            f"{text} is not a folder: {str(error).rstrip('.')}.", remedy="Give a model folder."
        ) from error
    if folder.is_dir():
        return folder
    if text.startswith(("http://", "https://")):
        raise errors.InvalidRequest(
            f"{text} is a server's address; this version talks to local engines only.",
            remedy="Give a model folder, a repository id, or nothing for the shipped model.",
        )
    if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise errors.ModelBroken(f"{text} is not a folder.", remedy="Give a Hugging Face model folder or owner/name.")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise errors.ExtraMissing(
            "Repository ids need the huggingface-hub package.", remedy="Install agentspeed[engine]."
        ) from error
    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise errors.ModelBroken(
            f"{text} could not be fetched: {reason}.", remedy="Check the name and the network, or give a local folder."
        ) from error


def codec_of(folder: Path) -> ChatCodec:
    """The folder's codec; the same one until a file of it changes, for sessions come by the thousand. Raises what
    `ChatCodec` raises."""
    files = (folder / name for name in _CODEC_FILES)
    stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None for path in files)
    return _cached_codec(folder.resolve(), stamps)


@lru_cache(maxsize=8)
def _cached_codec(folder: Path, stamps: tuple[tuple[int, int] | None, ...]) -> ChatCodec:
    return ChatCodec(folder)
