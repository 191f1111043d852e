"""How engine processes start and end whatever surrounds them: folders, environments, interpreters, prints, kills."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from agentspeed import Engine, errors
from agentspeed.transport import launch
from agentspeed.transport.engine_process import EngineProcess, EngineSlot
from agentspeed.transport.socket_folder import SocketFolder
from tests.support.engine_client import alive, environment, until

NOOP = {"model": "noop:512:0", "pages": 64}


def ready(process: EngineProcess) -> None:
    """Waits until it listens, and ends it."""
    try:
        process.await_readiness()
        assert process.socket_path.exists()
    finally:
        process.stop()
    assert not process.alive
    assert not process.socket_path.parent.exists()


# ---- the working folder ----------------------------------------------------------------------------------------------
def test_no_file_of_the_working_folder_runs_in_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("queue", "json", "numpy", "msgspec", "selectors", "sitecustomize", "agentspeed_engine"):
        _ = (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the working folder ran in the engine')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", ""))  # an empty entry: the folder again
    ready(EngineProcess(NOOP))


def test_a_module_on_the_path_that_the_user_gave_is_found_by_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    _ = (tmp_path / "sitecustomize.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ready(EngineProcess(NOOP))
    assert mark.exists()


def test_folders_that_python_searches_by_itself_come_behind_its_own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folders = launch.environment().get("PYTHONPATH", "").split(os.pathsep)
    assert not any("site-packages" in folder for folder in folders)


# ---- what is printed -------------------------------------------------------------------------------------------------
PRINTS = """
import sys, threading
print("NCCL INFO Bootstrap: using eth0", flush=True)
print('{"ready": "somebody else", "code": "internal"}', flush=True)
def flood():
    for number in range(3000):
        print("x" * 100, flush=True)
    sys.stdout.buffer.write(b"no UTF-8: \\xff\\xfe\\n")
    sys.stdout.buffer.write(b"y" * 200_000 + b"\\n")
    print("the end of it", flush=True)
threading.Timer(0.5, flood).start()
"""


def test_what_a_library_prints_is_neither_taken_for_readiness_nor_fills_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _ = (tmp_path / "sitecustomize.py").write_text(PRINTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    caplog.set_level(logging.INFO, logger="agentspeed.engine")
    process = EngineProcess(NOOP)
    try:
        process.await_readiness()
        assert process.socket_path.exists()
        until("all was read", lambda: "the end of it" in caplog.text, 20.0)
        assert "NCCL INFO" in caplog.text and "no UTF-8: \ufffd\ufffd" in caplog.text
    finally:
        process.stop()


def test_the_engines_own_warnings_are_warnings_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("AGENTSPEED_RUNTIME_DIR", str(runtime))
    runtime.chmod(0o777)  # others may write there: the engine cannot be listed, and serves all the same
    ready(EngineProcess(NOOP))
    said = [record for record in caplog.records if "not listed" in record.message]
    assert [record.levelno for record in said] == [logging.WARNING]


# ---- folders ---------------------------------------------------------------------------------------------------------
def test_a_long_folder_for_temporary_files_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 95)
    long.mkdir()
    for name in ("AGENTSPEED_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    ready(EngineProcess(NOOP))
    assert list(long.iterdir()) == [], "the folder in which it was listed goes with the last engine"


def test_the_runtime_folder_goes_with_its_last_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTSPEED_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    one, other = EngineProcess(NOOP), EngineProcess(NOOP)
    try:
        other.await_readiness()
        ready(one)
        assert len(list(tmp_path.iterdir())) == 1
    finally:
        other.stop()
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_folder_that_was_named_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "run"
    named.mkdir(mode=0o700)
    monkeypatch.setenv("AGENTSPEED_RUNTIME_DIR", f"{named}/")
    ready(EngineProcess(NOOP))
    assert named.is_dir() and not list(named.iterdir())


def test_a_runtime_folder_that_does_not_exist_and_cannot_be_made_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = (tmp_path / "file").write_text("")
    monkeypatch.delenv("AGENTSPEED_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file" / "run"))
    ready(EngineProcess(NOOP))


def test_without_any_place_for_a_socket_the_error_names_each_and_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentspeed.transport.socket_folder._places", lambda: iter([tmp_path / ("x" * 120)]))
    with pytest.raises(errors.EngineStartFailed, match=r"too long.*AGENTSPEED_RUNTIME_DIR"):
        _ = EngineProcess(NOOP)


def test_a_folder_whose_two_processes_were_killed_goes_when_the_next_is_made() -> None:
    process = EngineProcess(NOOP)
    process.await_readiness()
    folder = process.socket_path.parent
    os.kill(process.pid, signal.SIGSTOP)  # it does not see the end of its stdin
    process.let_go()  # as if this process had been killed: nobody else holds the folder but the engine
    other = SocketFolder()
    assert folder.exists(), "its engine lives"
    os.kill(process.pid, signal.SIGKILL)
    process.wait_for_death()
    third = SocketFolder()
    assert not folder.exists()
    assert other.path.exists()
    other.remove()
    third.remove()
    assert not other.path.exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_is_killed_leaves_no_folder(tmp_path: Path, how: signal.Signals) -> None:
    script = """
import anyio
from agentspeed.transport.engine_process import EngineProcess
process = EngineProcess({"model": "noop:512:0", "pages": 64})
process.await_readiness()
print(process.pid, flush=True)
anyio.run(anyio.sleep, 60)
"""
    surroundings = environment() | {"TMPDIR": str(tmp_path), "AGENTSPEED_RUNTIME_DIR": str(tmp_path / "run")}
    with subprocess.Popen([sys.executable, "-c", script], env=surroundings, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        engine = int(program.stdout.readline())
        program.send_signal(how)
        _ = program.wait(10)
    until("the engine ended", lambda: not alive(engine))
    until("its folder is gone", lambda: list((tmp_path / "run").iterdir()) == [])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- environments and interpreters -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "surroundings",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"},
    ],
    ids=["ASCII locale", "ASCII streams", "Latin-1 streams"],
)
def test_an_engine_starts_in_an_environment_without_utf_8(
    checkpoint: Path, tmp_path: Path, surroundings: dict[str, str]
) -> None:
    folder = tmp_path / "модель"
    folder.symlink_to(checkpoint)
    script = """
import os, sys, anyio
from agentspeed import Engine
async def main():
    async with Engine(os.fsdecode(os.fsencode(sys.argv[1])), pages=64) as engine, engine.session() as s:
        assert (await s.generate("Hello, \\u043c!", max_tokens=2)).usage.drawn == 2
anyio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=environment() | surroundings,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")


@pytest.mark.parametrize("executable", ["", "/usr/sbin/uwsgi", sys.executable + "-gone"])
def test_a_program_that_is_no_interpreter_starts_engines_by_the_one_of_its_installation(
    monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert Path(launch.interpreter()).parent == Path(sys.exec_prefix) / "bin"
    ready(EngineProcess(NOOP))


def test_a_frozen_program_is_not_started_again_as_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frozen = tmp_path / "python-app"
    frozen.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(frozen))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "exec_prefix", str(tmp_path))
    with pytest.raises(errors.EngineStartFailed, match="AGENTSPEED_PYTHON"):
        _ = EngineProcess(NOOP)
    monkeypatch.setenv("AGENTSPEED_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(errors.EngineStartFailed, match="could not be started"):
        _ = EngineProcess(NOOP)


def test_a_program_that_ends_without_a_word_is_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = shutil.which("true")
    assert silent is not None
    monkeypatch.setenv("AGENTSPEED_PYTHON", silent)
    with pytest.raises(errors.EngineStartFailed, match=r"it said nothing\. See that AGENTSPEED_PYTHON"):
        EngineProcess(NOOP).await_readiness()


def test_an_engine_that_computes_nothing_needs_no_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ready(EngineProcess(NOOP))
    with pytest.raises(errors.ExtraMissing, match="PyTorch"):
        _ = EngineProcess({"model": "/some/model"})


# ---- stopped engines -------------------------------------------------------------------------------------------------
@pytest.mark.anyio
async def test_a_timeout_is_kept_though_the_engine_is_stopped_and_the_session_goes_on_after(checkpoint: Path) -> None:
    engine = Engine.over(EngineSlot({"model": "noop:512:20", "pages": 256}), checkpoint)
    async with engine, engine.session() as s, engine.session() as other:
        _ = await s.generate("Hi", max_tokens=2)
        _ = await other.generate("Hi", max_tokens=2)
        assert engine.pid is not None
        before, pid = s.ids, engine.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(2):  # the second finds its branch left behind
                begun = time.monotonic()
                with pytest.raises(errors.TurnTimeout):
                    _ = await s.generate("Again", max_tokens=2, timeout=0.5)
                assert time.monotonic() - begun < 2.5
                assert s.ids == before
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (await s.generate("Again", max_tokens=2)).usage.drawn == 2
        assert (await other.generate("Again", max_tokens=2)).usage.drawn == 2
        assert engine.pid == pid, "the others of its link have noticed nothing"
        with anyio.fail_after(10):
            while (await engine.stats()).counts["branches"] != 2:  # noqa: ASYNC110 - what was left behind is closed
                await anyio.sleep(0.05)


@pytest.mark.anyio
async def test_a_turn_that_runs_is_left_behind_by_a_stopped_engine_within_its_timeout(checkpoint: Path) -> None:
    engine = Engine.over(EngineSlot({"model": "noop:512:20", "pages": 256}), checkpoint)
    async with engine, engine.session() as s:
        assert engine.pid is not None
        before, begun = s.ids, time.monotonic()
        try:
            with pytest.raises(errors.TurnTimeout):
                async with s.stream("Speak.", max_tokens=2000, timeout=1.0) as turn:
                    async for _ in turn:
                        os.kill(engine.pid, signal.SIGSTOP)
            assert time.monotonic() - begun < 3.5
            assert s.ids == before
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        assert (await s.generate("Hi", max_tokens=2)).usage.drawn == 2


def test_a_stopped_engine_ends_when_it_is_told_to() -> None:
    process = EngineProcess(NOOP)
    process.await_readiness()
    os.kill(process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    process.stop()
    assert time.monotonic() - begun < 4.0
    assert not process.socket_path.parent.exists()


# ---- credentials -----------------------------------------------------------------------------------------------------
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_engine_with_a_credential_greets_only_who_shows_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    _ = secret.write_text("open sesame\n")
    monkeypatch.setenv("AGENTSPEED_CREDENTIAL_FILE", str(secret))
    process = EngineProcess(NOOP)
    await anyio.to_thread.run_sync(process.await_readiness)
    try:
        monkeypatch.setenv("AGENTSPEED_ENGINE", str(process.socket_path))
        slot = EngineSlot({}, attach=process.socket_path)
        async with Engine.over(slot, checkpoint) as engine, engine.session() as s:
            assert (await s.generate("Hi", max_tokens=2)).usage.drawn == 2
        _ = secret.write_text("another\n")
        with pytest.raises(errors.InvalidRequest, match=r"credential.*AGENTSPEED_CREDENTIAL_FILE"):
            async with Engine.over(slot, checkpoint):
                raise AssertionError("greeted with another credential")
        monkeypatch.delenv("AGENTSPEED_CREDENTIAL_FILE")
        with pytest.raises(errors.InvalidRequest, match="credential"):
            async with Engine.over(slot, checkpoint):
                raise AssertionError("greeted without a credential")
        monkeypatch.setenv("AGENTSPEED_CREDENTIAL_FILE", str(tmp_path / "nothing"))
        with pytest.raises(errors.InvalidRequest, match="nothing"):
            async with Engine.over(slot, checkpoint):
                raise AssertionError("greeted with a credential that is not there")
    finally:
        process.stop()


def test_refusals_and_progress_go_to_the_status_descriptor(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-P", "-m", "agentspeed_engine.serve", "--socket", str(tmp_path / "e.sock")]
    options = ["--status-fd", str(writing), "--options", json.dumps({"model": "noop:0:0"})]
    done = subprocess.run(
        [*command, *options],
        env=environment(),
        pass_fds=(writing,),
        stdin=subprocess.PIPE,
        capture_output=True,
        timeout=60,
        check=False,
    )
    os.close(writing)
    with open(reading, encoding="utf-8") as status:
        said = [json.loads(line) for line in status]
    assert done.returncode == 2 and not done.stdout
    assert [line["code"] for line in said] == ["bad_options"]
