"""Running engines write down that they run; what a killed one leaves behind is cleaned away."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from agentspeed_engine.serve.engine_registry import RunningEngine, answers, entered, folder, in_place, leave, running


def listening(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen(1)
    return server


def test_an_engine_is_listed_while_it_runs(tmp_path: Path) -> None:
    place, entry = tmp_path / "run", RunningEngine(os.getpid(), tmp_path / "e.sock", "model")
    with listening(entry.socket):
        with entered(place, entry):
            assert running(place) == [entry]
        assert running(place) == []
    assert not place.exists(), "it made the folder, and is the last in it"


def test_a_folder_that_another_one_leaves_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, whole = tmp_path / "run", Path.mkdir
    gone: list[Path] = []

    def raced(self: Path, *given: Any, **named: Any) -> None:
        whole(self, *given, **named)
        if len(gone) < 2:
            gone.append(self)
            leave(self)

    monkeypatch.setattr(Path, "mkdir", raced)
    assert in_place(place, lambda: (place / "file").write_text("here")) == 4
    assert gone == [place, place]
    leave(place)
    assert place.exists(), "something is in it"


def test_entries_that_nobody_answers_for_are_removed(tmp_path: Path) -> None:
    with entered(tmp_path, RunningEngine(12, tmp_path / "e.sock", "m")):
        assert len(list(tmp_path.iterdir())) == 1
        assert running(tmp_path) == []
        assert list(tmp_path.iterdir()) == []


def test_a_draft_that_a_killed_engine_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, fresh = tmp_path / "12-0123abcd.new", tmp_path / "13-0123abcd.new"
    for draft in (old, fresh):
        _ = draft.write_text("{")
    os.utime(old, (0, 0))
    assert running(tmp_path) == []
    assert list(tmp_path.iterdir()) == [fresh]


FOREIGN = {
    "package.json": '{"name": "somebody\'s"}',
    "settings.json": '{"pid": 12, "socket": "/nowhere/e.sock", "model": "m"}',
    "12-00000000.json": '{"pid": 12, "socket": "/nowhere/e.sock", "model": "m"}',
    "13-00000000.json": "half an ent",
    "deep.json": "[" * 100_000,
    "notes.new": "kept",
    "latin-1.json": b"\xff\xfe",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_no_entries_are_left_alone(tmp_path: Path, name: str) -> None:
    said = FOREIGN[name]
    _ = (tmp_path / name).write_bytes(said if isinstance(said, bytes) else said.encode())
    os.utime(tmp_path / name, (0, 0))
    assert running(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_known_sockets_are_not_asked_again(tmp_path: Path) -> None:
    entry = RunningEngine(5, tmp_path / "gone.sock", "m")
    with entered(tmp_path, entry):
        assert running(tmp_path, known={entry.socket}) == [entry]


def test_an_engine_too_busy_to_accept_counts_as_running(tmp_path: Path) -> None:
    path = tmp_path / "busy.sock"
    peers: list[socket.socket] = []
    with listening(path):
        for _ in range(3):  # fills the backlog: nobody accepts
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            peer.setblocking(False)
            peers.append(peer)
            try:
                peer.connect(str(path))
            except BlockingIOError:
                break
        assert answers(path)
        for peer in peers:
            peer.close()


def test_a_folder_that_others_can_write_to_is_neither_used_nor_believed(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with (
        pytest.raises(PermissionError, match="others may write"),
        entered(tmp_path, RunningEngine(1, tmp_path / "e", "m")),
    ):
        pass
    with listening(tmp_path / "e.sock"):
        _ = (tmp_path / "1-0.json").write_text(f'{{"pid": 1, "socket": "{tmp_path}/e.sock", "model": "m"}}')
        assert running(tmp_path) == []


def test_the_folder_is_the_users_own() -> None:
    assert folder({"AGENTSPEED_RUNTIME_DIR": "/a", "XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/a")
    assert folder({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/agentspeed")
    assert folder({}).name == f"agentspeed-{os.getuid()}"


def test_a_runtime_folder_below_a_file_has_no_engines(tmp_path: Path) -> None:
    _ = (tmp_path / "file").write_text("")
    assert running(tmp_path / "file" / "run") == []
