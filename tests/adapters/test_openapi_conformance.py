"""Schemathesis against a live server: nothing that it makes up is a server error, or answered as no document says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from agentspeed.server.options import ServerOptions
from tests.support.server_run import server

if importlib.util.find_spec("schemathesis") is None:
    pytest.skip("run by `make conformance`, in an environment that has schemathesis", allow_module_level=True)

_KNOWN = '[parameters]\n"path.number" = "known"\n"path.label" = "known"\n"path.model" = "nano"\n'
_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.timeout(900)
def test_the_server_answers_as_its_document_says(tmp_path: Path) -> None:
    settings = tmp_path / "schemathesis.toml"
    settings.write_text(_KNOWN)
    options = ServerOptions(
        port=0, drain_seconds=3.0, max_tokens=8, default_max_tokens=4, turn_seconds=20, max_links=8, max_sessions=64
    )
    with server(options=options, pages=256) as url:
        assert httpx.post(f"{url}/v1/sessions", json={"name": "known"}).status_code == 200
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run"]
        done = subprocess.run(
            [
                *command,
                f"{url}/openapi.json",
                *("--checks", _CHECKS, "--phases", "fuzzing,coverage", "-n", "20", "--seed", "1"),
                *("--request-timeout", "20", "--continue-on-failure", "--exclude-method", "DELETE"),
                # Reading a link waits for what the engine says next, which is nothing.
                *("--exclude-path", "/v1/links/{number}/frames"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-8000:]
