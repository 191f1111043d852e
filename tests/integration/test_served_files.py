"""The tokenizer can come from the engine: a client without the model's folder makes the same ids and the same text."""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio.to_thread
import pytest

from agentspeed import errors
from agentspeed.chat.codec import ChatCodec
from agentspeed.testing.scripted_model import ScriptedText
from agentspeed.testing.scripted_server import ScriptedServer
from agentspeed.transport.base import Transport, wire
from agentspeed.transport.in_thread import ThreadTransport
from agentspeed.transport.model_files import fetch_model_files
from agentspeed_engine.protocol.messages import TEXT_FILES
from agentspeed_engine.serve import model_files
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["thread", "scripted"])
def transport(request: pytest.FixtureRequest, model: Path) -> Transport:
    if request.param == "thread":
        return ThreadTransport({"model": str(model), "pages": 64})
    return ScriptedServer(model, lambda asked: ScriptedText(text="x"))


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_a_folder_from_the_engine_gives_the_same_ids_and_text(
    transport: Transport, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "PART_BYTES", 1000)  # many parts
    connection = await transport.connect(after_death=False)
    fetched = await fetch_model_files(connection, tmp_path / "cache")
    assert contents(fetched) == {name: data for name, data in contents(model).items() if name in TEXT_FILES}
    here, there = [await anyio.to_thread.run_sync(ChatCodec, folder) for folder in (model, fetched)]
    text = "Which of them is it? \u2014 <|user|> \U0001f9ed"
    assert here.tokenizer.content_ids(text) == there.tokenizer.content_ids(text)
    assert here.stop_ids == there.stop_ids
    connection.close()
    await transport.close()


async def test_files_are_fetched_once(transport: Transport, tmp_path: Path, model: Path) -> None:
    connection = await transport.connect(after_death=False)
    first = await fetch_model_files(connection, tmp_path / "cache")
    shutil.rmtree(model)  # the engine could not serve them again
    assert await fetch_model_files(connection, tmp_path / "cache") == first
    connection.close()
    await transport.close()


@pytest.mark.parametrize("change", ["rewritten", "cut", "gone"])
async def test_a_file_that_changed_since_it_was_listed_is_refused_and_nothing_is_kept(
    transport: Transport, model: Path, tmp_path: Path, change: str
) -> None:
    connection = await transport.connect(after_death=False)
    path = model / "tokenizer_config.json"
    if change == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        _ = path.write_bytes(data[:-1] + b"x" if change == "rewritten" else data[:10])
    with pytest.raises((errors.ModelBroken, errors.InvalidRequest), match=r"tokenizer_config\.json"):
        _ = await fetch_model_files(connection, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    connection.close()
    await transport.close()


@pytest.mark.parametrize("name", ["model.safetensors", "../model/config.json", "/etc/passwd", ""])
async def test_no_other_file_can_be_read(transport: Transport, name: str) -> None:
    connection = await transport.connect(after_death=False)
    with pytest.raises(errors.InvalidRequest, match="serves no file"):
        _ = await connection.call(lambda request: wire.ReadModelFile(request=request, name=name, offset=0))
    with pytest.raises(errors.InvalidRequest, match="offset is -1"):
        _ = await connection.call(lambda request: wire.ReadModelFile(request=request, name="config.json", offset=-1))
    connection.close()
    await transport.close()


@pytest.mark.parametrize("name", ["../escaped.json", "/tmp/escaped.json", "weights.bin"])
async def test_an_engine_cannot_choose_where_a_client_writes(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ScriptedServer(model, lambda asked: None)
    listed = wire.ModelFiles(request=0, files=(wire.ModelFile(name=name, bytes=1, sha256="0" * 64),))
    monkeypatch.setattr(
        server.files, "listed", lambda command: wire.ModelFiles(request=command.request, files=listed.files)
    )
    connection = await server.connect(after_death=False)
    with pytest.raises(errors.ModelBroken, match="no tokenizer's"):
        _ = await fetch_model_files(connection, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    connection.close()
    await server.close()


async def test_an_engine_that_computes_nothing_serves_no_files(tmp_path: Path) -> None:
    transport = ThreadTransport({"model": "noop:512:0", "pages": 64})
    connection = await transport.connect(after_death=False)
    with pytest.raises(errors.ModelBroken, match="computes nothing"):
        _ = await fetch_model_files(connection, tmp_path)
    connection.close()
    await transport.close()
