"""A folder of snapshots: claimed once, bounded by tenant, whole or refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentspeed.server.snapshot_files import BrokenSnapshot, Saved, SnapshotFiles

WEEK = 7 * 24 * 3600.0


def _files(folder: Path, most_bytes: int = 1 << 20) -> SnapshotFiles:
    return SnapshotFiles(folder, most_bytes=most_bytes, most_seconds=WEEK)


def _saved(name: str, tenant: str = "a", data: bytes = b"ids") -> Saved:
    return Saved(tenant=tenant, name=name, data=data, last_event=7)


def test_of_two_servers_one_restores_a_session_and_what_it_gives_back_is_there_again(tmp_path: Path) -> None:
    one, other = _files(tmp_path), _files(tmp_path)
    one.save("sessions", _saved("s"))
    claim = other.claim("sessions", "a", ["longer", "s"])
    assert claim is not None and claim.saved == _saved("s")
    assert one.claim("sessions", "a", ["s"]) is None
    claim.give_back()
    again = one.claim("sessions", "a", ["s"])
    assert again is not None
    again.drop()
    assert not other.has("sessions", "a", "s")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_tenants_and_kinds_see_nothing_of_each_other(tmp_path: Path) -> None:
    files = _files(tmp_path)
    files.save("sessions", _saved("../../etc/passwd"))
    assert files.has("sessions", "a", "../../etc/passwd")
    assert files.claim("sessions", "b", ["../../etc/passwd"]) is None
    assert files.claim("history", "a", ["../../etc/passwd"]) is None


def test_the_oldest_of_a_tenant_go_when_there_are_too_many_bytes_and_others_keep_theirs(tmp_path: Path) -> None:
    files = SnapshotFiles(tmp_path, most_bytes=2500, most_seconds=WEEK, clock=lambda: 0.0)
    files.save("sessions", _saved("theirs", tenant="b", data=b"x" * 1000))
    seen = set(tmp_path.rglob("*.snapshot"))
    for number in range(5):
        files.save("sessions", _saved(str(number), data=b"x" * 1000))
        for path in set(tmp_path.rglob("*.snapshot")) - seen:
            os.utime(path, (number, number))  # files of one millisecond may have the same time
            seen.add(path)
    assert [number for number in range(5) if files.has("sessions", "a", str(number))] == [3, 4]
    assert files.has("sessions", "b", "theirs")


def test_what_waited_too_long_is_removed_also_what_a_killed_server_had_claimed(tmp_path: Path) -> None:
    now = [0.0]
    files = SnapshotFiles(tmp_path, most_bytes=1 << 20, most_seconds=WEEK, clock=lambda: now[0])
    files.save("sessions", _saved("s"))
    files.save("history", _saved("claimed"))
    assert files.claim("history", "a", ["claimed"]) is not None
    newest = max(path.stat().st_mtime for path in tmp_path.rglob("*") if path.is_file())
    now[0] = newest + WEEK - 60
    files.trim()
    assert files.has("sessions", "a", "s")
    now[0] = newest + WEEK + 60
    files.trim()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_that_was_moved_or_has_another_version_is_refused_and_stays(tmp_path: Path) -> None:
    files = _files(tmp_path)
    for name in ("mine", "other", "old"):
        files.save("sessions", _saved(name))
    place = {path.read_bytes(): path for path in tmp_path.rglob("*.snapshot")}
    mine, other, old = (next(place[data] for data in place if name in data) for name in (b"mine", b"other", b"old"))
    other.write_bytes(mine.read_bytes())
    old.write_bytes(old.read_bytes().replace(b"snapshot 1", b"snapshot 2"))
    for name, why in (("other", "another session's"), ("old", "version")):
        for _ in range(2):
            with pytest.raises(BrokenSnapshot, match=why) as caught:
                _ = files.claim("sessions", "a", [name])
            assert str(caught.value).startswith("tenant-")
    assert files.claim("sessions", "a", ["mine"]) is not None
