"""A session is answered by the model that stands in its folder now, wherever the program has gone to meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentspeed import Engine, Session, errors
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint
from tests.support.tokenizer_folders import tiktoken_folder

pytestmark = pytest.mark.anyio
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Whose only control token is one that the small tiktoken vocabulary has."""


@pytest.fixture(params=[("asyncio", {"use_uvloop": False})], ids=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """What is tested here is no matter of the event loop."""
    return request.param


async def ids(session: Session) -> list[int]:
    return list((await session.generate("Some words.", max_tokens=8)).ids)


async def test_weights_written_anew_answer_the_next_session_and_the_open_one_keeps_its_own(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    async with Session(folder, pages=70) as before:
        old = await ids(before)
        weights = load_file(folder / "model.safetensors")
        noise = torch.Generator().manual_seed(1)
        for name, held in weights.items():
            if held.ndim == 2:
                weights[name] = torch.randn(held.shape, generator=noise) * held.std()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        async with Session(folder, pages=70) as after, Engine(folder, pages=70) as engine, engine.session() as alone:
            new = await ids(after)
            assert new == await ids(alone) != old
            assert after.engine.pid != before.engine.pid
        async with Session(folder, pages=70) as again:
            assert await ids(again) == new
    async with Session(checkpoint, pages=70) as unchanged:
        assert await ids(unchanged) == old


async def test_a_relative_path_names_the_folder_it_named_when_the_engine_started(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        shutil.copytree(checkpoint, tmp_path / name / "model")
    monkeypatch.chdir(tmp_path / "a")
    async with Engine("./model", pages=70) as engine, engine.session() as first:
        assert len(await ids(first)) == 8
        monkeypatch.chdir(tmp_path / "b")
        async with Session("./model", pages=70) as second:  # another folder's model of that name is another model
            assert len(await ids(second)) == 8
            assert second.engine.pid != engine.pid
        monkeypatch.chdir("/")
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            try:
                assert len(await ids(first)) == 8
                break
            except errors.EngineDied:
                continue
        else:
            pytest.fail("the session did not go on")
        assert engine.pid != pid


async def test_a_tiktoken_vocabulary_serves_text_stop_strings_and_shapes(tmp_path: Path) -> None:
    """The front converts it, the engine reads the bytes of its tokens: both must see the same ids."""
    folder = make_checkpoint(
        CONFIG | {"vocab_size": 1024, "bos_token_id": 600, "eos_token_id": 603}, tmp_path / "model"
    )
    (folder / "tokenizer.json").unlink()
    settings = json.loads((tiktoken_folder(folder) / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = {
        "type": "object",
        "properties": {"n": {"enum": ["the lazy dog", 7]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    async with Session(folder, pages=70, dtype="float32") as s:
        assert len((await s.generate("Some words, 日本語.", max_tokens=4)).ids) == 4
        shaped = await s.generate("A shape.", output=shape, max_tokens=64)
        assert json.loads(shaped.text)["n"] in ("the lazy dog", 7)
        stopped = await s.generate("Stop.", stop=list("etaonisr "), max_tokens=200, temperature=1.5, seed=1)
        assert stopped.finish_reason == "stop_string" and not set(stopped.text) & set("etaonisr ")
