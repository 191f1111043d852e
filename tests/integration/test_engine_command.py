"""`agentspeed engine`: programs attach to it by the line that it prints, and SIGTERM ends it and its socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentspeed.cli.app import app
from agentspeed.sync import Session

_COMMAND = [sys.executable, "-c", "from agentspeed.cli import main; main()", "engine", "--pages", "64"]


def test_an_engine_stays_for_programs_to_attach_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = tmp_path / "at" / "engine.sock"
    engine = subprocess.Popen(
        [*_COMMAND, "--socket", str(socket), "--set", "max_sessions=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert engine.stdout is not None
        assert engine.stdout.readline() == f"export AGENTSPEED_ENGINE={socket}\n"
        monkeypatch.setenv("AGENTSPEED_ENGINE", str(socket))
        with Session() as session:
            assert session.generate("Hi.", max_tokens=2).ids
        engine.send_signal(signal.SIGTERM)
        assert engine.wait(20) == 0
        assert not os.path.lexists(socket)
    finally:
        engine.kill()
        _ = engine.wait(5)
        if engine.stdout is not None:
            engine.stdout.close()


def test_options_that_no_engine_has_are_refused_by_name() -> None:
    for setting, said in (("max_sesions=3", "max_sessions"), ("pages", "NAME=VALUE")):
        done = CliRunner().invoke(app, ["engine", "--set", setting])
        assert done.exit_code == 2 and said in done.output
