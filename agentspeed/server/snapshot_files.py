"""A folder of snapshots that outlive their server: by tenant and name, for their owner alone, whole or refused by name.

Every function here blocks; the event loop calls it in a thread. Several servers may share the folder: whoever claims a
snapshot moves it away first, so it is restored once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, final

import msgspec

from agentspeed import errors

Kind: TypeAlias = Literal["sessions", "history", "responses", "conversations"]
_MAGIC: Final = b"agentspeed snapshot 1\n"
_DIGEST_BYTES: Final = 16
_ENDING: Final = ".snapshot"


@final
class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """One value in a file. `data` of a session: what `Session.snapshot` gave. `last_event`: number of its newest
    event."""

    tenant: str
    name: str
    data: bytes
    last_event: int = 0


@final
class BrokenSnapshot(Exception):
    """A file that cannot be read, or holds what cannot be restored. It stays where it is. `name`: of what is in it."""

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(reason)
        self.name = name


@final
@dataclass(frozen=True, slots=True)
class Claim:
    """A snapshot that nobody else can restore, until it is dropped or given back."""

    saved: Saved
    home: Path
    place: Path

    def drop(self) -> None:
        """It was restored: the session lives again, and will be saved anew."""
        self.place.unlink(missing_ok=True)

    def give_back(self) -> None:
        """It could not be restored now, and another request may try again; unless it was trimmed meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.place, self.home)


@final
class SnapshotFiles:
    """`most_bytes`: of one tenant and kind, the oldest go first. `most_seconds`: older ones are removed."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        most_bytes: int,
        most_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Makes the folder. Raises `InvalidRequest` when it cannot be written."""
        self.folder = Path(folder)
        self._most_bytes = most_bytes
        self._most_seconds = most_seconds
        self._clock = clock
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError("it cannot be written")
        except OSError as error:
            raise errors.InvalidRequest(
                f"Snapshots cannot be kept in {str(self.folder)!r}: {error.strerror or error}.",
                remedy="Give a folder that this user can write.",
            ) from error

    def save(self, kind: Kind, saved: Saved) -> None:
        """Whole or not at all, readable for this user alone; then the oldest go. Raises `OSError`."""
        place = self._place(kind, saved.tenant, saved.name)
        for folder in (place.parent.parent, place.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        data = msgspec.msgpack.encode(saved)
        new = place.with_suffix(f".new-{secrets.token_hex(8)}")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                _ = file.write(_MAGIC + _digest(data) + data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, place)
        finally:
            new.unlink(missing_ok=True)
        self._trim(place.parent, keep=place)

    def has(self, kind: Kind, tenant: str, name: str) -> bool:
        """Whether `claim` would find it."""
        return self._place(kind, tenant, name).exists()

    def remove(self, kind: Kind, tenant: str, name: str) -> bool:
        """Whether it was there, whole or broken. Raises `OSError`."""
        try:
            self._place(kind, tenant, name).unlink()
        except FileNotFoundError:
            return False
        return True

    def claim(self, kind: Kind, tenant: str, names: Iterable[str]) -> Claim | None:
        """The first of `names` that is there. Raises `BrokenSnapshot`, and `OSError` for a folder that went away."""
        for name in names:
            home = self._place(kind, tenant, name)
            place = home.with_suffix(f".claimed-{secrets.token_hex(8)}")
            try:
                os.replace(home, place)
            except FileNotFoundError:
                continue
            try:
                return Claim(_read(place, tenant, name), home, place)
            except (OSError, BrokenSnapshot) as error:
                os.replace(place, home)
                raise BrokenSnapshot(f"{home.relative_to(self.folder)} {error}", name) from error
        return None

    def trim(self) -> None:
        """Removes what is too old, of all tenants: also what a server left that was killed."""
        for folder in self.folder.glob("*/*/"):
            self._trim(folder)

    def _trim(self, folder: Path, keep: Path | None = None) -> None:
        found: list[tuple[float, int, Path]] = []
        for path in folder.iterdir():
            try:
                seen = path.stat()
            except FileNotFoundError:  # another server has claimed it
                continue
            found.append((seen.st_mtime, seen.st_size, path))
        over = sum(size for _, size, _ in found) - self._most_bytes
        for at, size, path in sorted(found):
            if path != keep and (over > 0 or self._clock() - at > self._most_seconds):
                path.unlink(missing_ok=True)
                over -= size

    def _place(self, kind: Kind, tenant: str, name: str) -> Path:
        """Names are whatever clients wrote: no part of a path is."""
        return (
            self.folder / f"tenant-{_digest(tenant.encode()).hex()}" / kind / f"{_digest(name.encode()).hex()}{_ENDING}"
        )


def _read(place: Path, tenant: str, name: str) -> Saved:
    data = place.read_bytes()
    if not data.startswith(_MAGIC):
        raise BrokenSnapshot("is no snapshot, or has a version that this agentspeed does not read", name)
    digest, payload = data[len(_MAGIC) :][:_DIGEST_BYTES], data[len(_MAGIC) + _DIGEST_BYTES :]
    if digest != _digest(payload):
        raise BrokenSnapshot("is damaged: its checksum is another", name)
    try:
        saved = msgspec.msgpack.decode(payload, type=Saved)
    except msgspec.DecodeError as error:
        raise BrokenSnapshot(f"is damaged: {error}", name) from error
    if (saved.tenant, saved.name) != (tenant, name):
        raise BrokenSnapshot("is another session's: it was moved here", name)
    return saved


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
