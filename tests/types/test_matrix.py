"""Every (state, verb) pair, judged by mypy and pyright: what they accept is exactly what the tables say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentspeed_engine.kv.transitions import BRANCHES, NODES, Verb

ROOT = Path(__file__).resolve().parents[2]
CALLS = ("illegal.py", "sdk_calls.py")
UNREAD = ("torch", "huggingface_hub", "mcp")
"""Packages of which no type stands in these calls, and which are most of what they import."""
HEAD = """
from agentspeed_engine.ids import BranchId, PageId, SlotId, TicketId
from agentspeed_engine.kv.branch_states import AtRest, Closed, Decoding, Held, Prefilling, Promoting, Queued
from agentspeed_engine.kv.branch_states import Settling, Then
from agentspeed_engine.kv.node_states import Both, Device, Gone, Host, Loading, Saving
from agentspeed_engine.kv.branch import Room
from agentspeed_engine.kv.kv_cache import KvCache
from agentspeed_engine.kv.turn import Turn

def cells(kv: KvCache, room: Room, turn: Turn, then: Then, held: Held, ids: list[int], numbers: tuple[BranchId, ...],
          now: float, pages: tuple[PageId, ...], slots: tuple[SlotId, ...], ticket: TicketId) -> None:
"""


def matrix() -> tuple[str, dict[int, tuple[str, str]]]:
    """The generated module, and which cell each of its lines is."""
    lines = HEAD.strip("\n").split("\n")
    cells: dict[int, tuple[str, str]] = {}
    for table in (BRANCHES, NODES):
        verbs: dict[str, Verb] = {verb.name: verb for row in table.values() for verb in row}
        for state, row in table.items():
            legal = {verb.name: verb for verb in row}
            for name in sorted(verbs):
                verb = legal.get(name, verbs[name])
                lines.append(f"    def {state}_{name}(it: {state}) -> {verb.returns}:")
                lines.append(f"        return it.{name}({verb.arguments})")
                cells[len(lines)] = (state, name)
    return "\n".join(lines) + "\n", cells


def legal_cells() -> set[tuple[str, str]]:
    return {(state, verb.name) for table in (BRANCHES, NODES) for state, row in table.items() for verb in row}


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, tuple[str, str]]]:
    source, cells = matrix()
    path = tmp_path_factory.mktemp("matrix") / "matrix.py"
    _ = path.write_text(source)
    return path, cells


@pytest.fixture(scope="module")
def said_by_mypy(module: tuple[Path, dict[int, tuple[str, str]]]) -> str:
    """Of the generated module and of the calls beside this file, in one run: most of its time goes into what they
    import, of which it reads the signatures alone."""
    path, _ = module
    config = path.with_name("mypy.ini")
    _ = config.write_text("".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in UNREAD))
    options = ["--strict", "--no-error-summary", "--follow-imports=silent", "--cache-dir=/dev/null"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            *options,
            f"--config-file={config}",
            str(path),
            *(str(Path(__file__).with_name(name)) for name in CALLS),
        ],
        capture_output=True,
        text=True,
        cwd=path.parent,
        check=False,
        env={"MYPYPATH": f"{ROOT}:{ROOT / 'engine'}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def test_mypy_accepts_exactly_the_cells_of_the_tables(
    module: tuple[Path, dict[int, tuple[str, str]]], said_by_mypy: str
) -> None:
    path, cells = module
    rejected = _rejected(said_by_mypy, path.name, cells, r":(\d+): error: ")
    assert rejected
    assert set(cells.values()) - rejected == legal_cells()


def test_pyright_accepts_exactly_the_cells_of_the_tables(module: tuple[Path, dict[int, tuple[str, str]]]) -> None:
    path, cells = module
    _ = (path.parent / "pyrightconfig.json").write_text(
        f'{{"extraPaths": ["{ROOT / "engine"}", "{ROOT / "kernels"}"], "typeCheckingMode": "standard"}}'
    )
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "-p", str(path.parent), "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        cwd=path.parent,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    rejected = _rejected(done.stdout, path.name, cells, r":(\d+):\d+ - error: ")
    assert set(cells.values()) - rejected == legal_cells()


def _rejected(output: str, name: str, cells: dict[int, tuple[str, str]], pattern: str) -> set[tuple[str, str]]:
    lines = [int(number) for number in re.findall(re.escape(name) + pattern, output)]
    strangers = [line for line in lines if line not in cells]
    assert not strangers, f"errors outside the cells, lines {strangers}:\n{output}"
    return {cells[line] for line in lines}


@pytest.mark.parametrize("name", CALLS)
def test_every_illegal_call_is_still_a_type_error(name: str, said_by_mypy: str) -> None:
    """Each has a comment that says so; mypy names comments that nothing needs."""
    assert [line for line in said_by_mypy.splitlines() if Path(line.partition(":")[0]).name == name] == []
