"""What a client needs of a model to make ids of text, from the engine that serves it, when the folder is elsewhere."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

import anyio.to_thread

from agentspeed import errors
from agentspeed.transport.base import Connection, wire

_NAME: Final = re.compile(r"[A-Za-z0-9_]+\.(json|jinja|model)")
"""A plain file's name: an engine elsewhere does not say where in this machine it is written."""
_MOST_BYTES: Final = 256 << 20
"""Of all files together; the largest tokenizers have some 30 MB."""
_PATIENCE: Final = 15.0
"""Seconds of the engine's silence after which it is given up."""
_AGAIN: Final = "Start the engine anew, with the model as it is now."


async def fetch_model_files(connection: Connection, cache: Path | None = None) -> Path:
    """A folder with the tokenizer, chat template and configuration of the model that the engine serves.

    Files are kept in `cache` (None: the user's cache folder) under the digest of all of them, and fetched once. Raises
    `ModelBroken` when the engine serves none, or not what it listed; `EngineDied` when it goes meanwhile; and
    `InvalidRequest` when `cache` cannot be written."""
    listed = await connection.call(lambda request: wire.GetModelFiles(request=request), patience=_PATIENCE)
    if not isinstance(listed, wire.ModelFiles):
        raise errors.InternalError(f"The engine answered GetModelFiles with {type(listed).__name__}.")
    _check(listed.files)
    place = (_user_cache() if cache is None else cache) / _digest(listed.files)
    if await anyio.to_thread.run_sync(place.is_dir):
        return place
    data = {file.name: await _read(connection, file) for file in listed.files}
    try:
        await anyio.to_thread.run_sync(_write, place, data)
    except OSError as error:
        raise errors.InvalidRequest(
            f"The model's files cannot be kept in {place.parent}: {error}.",
            remedy="Set XDG_CACHE_HOME to a folder of yours.",
        ) from error
    return place


def _check(files: tuple[wire.ModelFile, ...]) -> None:
    if not files:
        raise errors.ModelBroken(
            "The engine serves no model's files: it computes nothing.", remedy="Give a model folder of this machine."
        )
    if any(not _NAME.fullmatch(file.name) for file in files) or sum(file.bytes for file in files) > _MOST_BYTES:
        raise errors.ModelBroken(
            f"The engine lists files that are no tokenizer's: {', '.join(repr(file.name) for file in files)}.",
            remedy="Give a model folder of this machine.",
        )


def _digest(files: tuple[wire.ModelFile, ...]) -> str:
    said = "".join(f"{file.name}\0{file.sha256}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256(said.encode()).hexdigest()


async def _read(connection: Connection, file: wire.ModelFile) -> bytes:
    data = bytearray()
    while len(data) < file.bytes:
        offset = len(data)
        part = await connection.call(
            lambda request: wire.ReadModelFile(request=request, name=file.name, offset=offset),  # noqa: B023
            patience=_PATIENCE,
        )
        if not isinstance(part, wire.FilePart):
            raise errors.InternalError(f"The engine answered ReadModelFile with {type(part).__name__}.")
        if not part.data:
            break
        data += part.data
    if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
        raise errors.ModelBroken(f"{file.name} has changed since the engine loaded its model.", remedy=_AGAIN)
    return bytes(data)


def _write(place: Path, data: dict[str, bytes]) -> None:
    """Whole or not at all: another process may fetch the same at the same time."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=place.parent))
    try:
        for name, content in data.items():
            _ = (draft / name).write_bytes(content)
        if not place.is_dir():
            _ = draft.rename(place)
    except OSError:
        if not place.is_dir():  # else the other process was first, with the same files
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "agentspeed" / "served"
    except RuntimeError as error:  # a user without a home
        raise errors.InvalidRequest(
            f"There is no folder to keep the model's files in: {error}.", remedy="Set XDG_CACHE_HOME to one of yours."
        ) from error
