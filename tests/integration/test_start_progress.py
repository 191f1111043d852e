"""How far an engine's start is: told to who opens it, whatever that does with it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from agentspeed import Engine, Session, Starting, errors
from agentspeed.cli.loading import loading
from agentspeed.cli.one_shot import one_shot
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """New for each test: an engine that another one shares has started already."""
    return make_checkpoint(CONFIG, tmp_path / "model", dtype="float32")


async def test_an_engine_tells_how_far_it_is(folder: Path) -> None:
    told: list[Starting] = []
    async with Engine(folder, pages=8, on_start=told.append):
        parts = [how.part for how in told if how.part is not None]
        assert parts == sorted(parts) and parts[0] < 1.0 and parts[-1] == 1.0
        assert any(how.text.startswith("loading model") for how in told)
        before = len(told)
    assert len(told) == before


async def test_a_model_on_ranks_tells_how_far_its_pieces_are(folder: Path) -> None:
    told: list[Starting] = []
    async with Engine(folder, pages=8, tp=2, on_start=told.append):
        parts = [how.part for how in told if how.part is not None]
        assert parts == sorted(parts) and parts[0] < 1.0 and parts[-1] == 1.0


async def test_a_session_tells_of_the_engine_that_starts_for_it(folder: Path) -> None:
    told: list[Starting] = []
    async with Session(folder, pages=8, on_start=told.append):
        assert told[-1].part == 1.0
    again: list[Starting] = []
    async with Session(folder, pages=8, on_start=again.append):
        assert not again  # it runs already


async def test_what_the_hook_raises_is_logged_and_the_engine_starts(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(how: Starting) -> None:
        raise RuntimeError("a bug of the program's")

    with caplog.at_level(logging.ERROR, "agentspeed.engine"):
        async with Engine(folder, pages=8, on_start=broken) as engine:
            assert engine.context_limit
    assert "a bug of the program's" in caplog.text


async def test_a_session_of_an_engine_that_was_made_elsewhere_has_no_start_to_tell_of() -> None:
    with pytest.raises(errors.InvalidRequest, match="on_start"):
        _ = Session(Engine(), on_start=print)


async def test_a_prompt_on_the_command_line_shows_how_far_the_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    given = {"tools": None, "system": None, "temperature": 0.0, "max_tokens": 4}
    await one_shot(str(folder), "Go.", **given, options={"pages": 8})
    said = capsys.readouterr().err
    assert "\rReading weights: 100%\x1b[K" in said
    assert said.count("\r\x1b[K") == 1, "the line goes before the answer"


@pytest.mark.parametrize("quiet", [False, True])
def test_where_no_terminal_is_each_tenth_is_a_line(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with loading(quiet=quiet) as line:
        for percent in range(101):
            line(Starting(text="loading", part=percent / 100))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ([] if quiet else [f"Reading weights: {10 * tenth}%" for tenth in range(1, 11)])
