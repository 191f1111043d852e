"""An engine process with a bug planted in its scheduler: what it says, and leaves, when a rule of its own is broken."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentspeed_engine.protocol import messages as wire
from tests.support.engine_client import Front, LinkClosed, environment

ENGINE = "from agentspeed_engine.serve.__main__ import main; raise SystemExit(main())"
BREAKS = """
from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.sched import step
honest = step.plan
def plan(world, now):
    if world.next_seq == 20:
        raise BrokenInvariant("a rule that step 20 breaks")
    return honest(world, now)
step.plan = plan
"""


@dataclass(frozen=True)
class Broken:
    """How it ended: the last words on a link that a turn ran on, what it printed, its exit status."""

    last: wire.Outgoing | None
    said: str
    status: int


def engine_that_breaks(folder: Path, planted: str, options: dict[str, Any]) -> Broken:
    """Starts it, begins a turn of 100 tokens, and waits until the engine has ended."""
    path = folder / "engine.sock"
    command = [sys.executable, "-c", planted + ENGINE, "--socket", str(path), "--options", json.dumps(options)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"AGENTSPEED_MALLOC": "as it is"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any("ready" in line for line in process.stdout), process.stderr.read()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(str(path))
            front = Front(link)
            with pytest.raises(LinkClosed) as closed:
                _ = front.generate(front.open(range(50)), max_tokens=100)
        said = process.stderr.read()
        return Broken(closed.value.last, said, process.wait(20))
