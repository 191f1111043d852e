"""Two fingerprints of a folder are equal as long as its model is the same, and at no write longer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agentspeed.transport.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    place = tmp_path / "model"
    place.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (place / name).write_bytes(b"0123")
    (tmp_path / "store" / "a").write_bytes(b"0123")
    (tmp_path / "store" / "b").write_bytes(b"0123")
    (place / "linked.safetensors").symlink_to(tmp_path / "store" / "a")
    return place


def in_place_with_its_old_time(folder: Path) -> None:
    path = folder / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"3210")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_a_rename_with_its_old_time(folder: Path) -> None:
    path, other = folder / "tokenizer.json", folder / "new"
    before = path.stat()
    other.write_bytes(b"9999")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


def another_behind_a_link(folder: Path) -> None:
    path = folder / "linked.safetensors"
    target = path.resolve().parent / "b"
    path.unlink()
    path.symlink_to(target)


def one_more(folder: Path) -> None:
    (folder / "model-2.safetensors").write_bytes(b"1")


def one_less(folder: Path) -> None:
    (folder / "config.json").unlink()


def renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")


WRITES = (in_place_with_its_old_time, by_a_rename_with_its_old_time, another_behind_a_link, one_more, one_less, renamed)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_change_of_the_model_changes_it(folder: Path, write: Callable[[Path], None]) -> None:
    before = fingerprint(folder)
    write(folder)
    assert fingerprint(folder) != before


def test_reading_and_other_files_change_nothing(folder: Path) -> None:
    before = fingerprint(folder)
    _ = (folder / "model.safetensors").read_bytes()
    (folder / "README.md").write_text("Other words.")
    (folder / "trainer.log").write_text("1")
    assert fingerprint(folder) == before


def test_what_is_no_folder_and_a_link_to_nothing_have_one_as_well(folder: Path) -> None:
    assert fingerprint(folder / "nothing") == fingerprint(folder / "nowhere")
    (folder / "gone.json").symlink_to(folder / "nothing")
    assert fingerprint(folder)
