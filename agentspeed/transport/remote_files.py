"""The tokenizer and template of a server's model, fetched once and kept by digest."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

import httpx

from agentspeed import errors
from agentspeed.transport.remote import checked

_MOST_BYTES: Final = 256 * 1024 * 1024


def cache_folder() -> Path:
    """`AGENTSPEED_CACHE_DIR`, or where the user's caches are."""
    named = os.environ.get("AGENTSPEED_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(named) if named else Path(base) / "agentspeed"


def model_folder(client: httpx.Client) -> Path:
    """A folder with the files of the server's model; what is there already is not fetched again. Blocks.

    Raises `ConnectFailed` when the server is not reached, and `ModelBroken` when a file is not what its digest says."""
    try:
        manifest: dict[str, str] = checked(client.get("/v1/model/files")).json()["files"]
        whole = hashlib.sha256(repr(sorted(manifest.items())).encode()).hexdigest()[:32]
        folder = cache_folder() / "models" / whole
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in manifest.items():
            if not _is_plain(name):
                raise errors.ModelBroken(f"The server names a file {name!r}, which is no plain name.")
            path = folder / name
            if not path.is_file() or _digest(path.read_bytes()) != digest:
                data = checked(client.get(f"/v1/model/files/{digest}")).content
                if len(data) > _MOST_BYTES or _digest(data) != digest:
                    raise errors.ModelBroken(f"What the server sent as {name} is not what its digest says.")
                _write(path, data)
        return folder
    except httpx.HTTPError as error:
        raise errors.ConnectFailed(f"{client.base_url} was not reached: {error or type(error).__name__}.",
                                   remedy="Is `agentspeed serve` running there?") from error
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, errors.AgentspeedError):
            raise
        raise errors.ConnectFailed(f"The model files of {client.base_url} could not be kept: {error}.",
                                   remedy="Set AGENTSPEED_CACHE_DIR to a folder that can be written to.") from error


def _is_plain(name: str) -> bool:
    return bool(name) and name == os.path.basename(name) and not name.startswith(".")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: other processes may read the folder."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            _ = file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
