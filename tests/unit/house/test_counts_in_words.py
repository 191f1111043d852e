"""Counts in messages are told as people tell them: 1 rank, 2 ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentspeed._base.wording import counted as counted_in_the_sdk
from agentspeed.cli.app import app
from agentspeed.cli.chat_screen import cost
from agentspeed.usage import Usage
from agentspeed_engine.errors import EngineFault
from agentspeed_engine.serve.options import EngineOptions, build
from agentspeed_engine.wording import counted as counted_in_the_engine

RUNNER = CliRunner()
CONFIG = str(Path(__file__).parents[3] / "bench/models/tiny.json")


@pytest.mark.parametrize("counted", [counted_in_the_sdk, counted_in_the_engine])
def test_one_is_one_and_all_others_are_several(counted: Callable[..., str]) -> None:
    assert [counted(count, "page") for count in (0, 1, 2)] == ["0 pages", "1 page", "2 pages"]
    assert [counted(count, "branch", "branches") for count in (1, 3)] == ["1 branch", "3 branches"]


@pytest.mark.parametrize(("words", "said"), [
    (["plan", CONFIG, "--rows", "1"], "on 1 rank: tp 1"),
    (["plan", CONFIG, "--rows", "1"], "steps on one rank, 1 row a dp rank"),
    (["plan", CONFIG, "--ep", "3"], "1 rank cannot make 3 equal groups"),
])  # fmt: skip
def test_commands_say_one_of_one(words: list[str], said: str) -> None:
    assert said in RUNNER.invoke(app, words).output


def test_an_engine_says_one_of_one() -> None:
    with pytest.raises(EngineFault, match=r"ep is 3, and 1 rank \(dp times tp\) cannot make so many equal groups"):
        build(EngineOptions(model=f"random:{CONFIG}", ep=3))


def test_a_chat_says_one_of_one() -> None:
    assert cost(Usage(resumed_device=1, new=2)).startswith("1 token resumed, 2 new")
