"""Each example does what it says: with a scripted model below it, and as one line with the shipped model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from agentspeed import ToolCall
from agentspeed.testing import ScriptedEngine, Turn, tool_call

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "agents"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(turn: Turn) -> list[str]:
    """The tool results in the log, in order."""
    return re.findall(r"<\|tool\|>(.*?)<\|end\|>", turn.log, re.DOTALL)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_parallel_tools_pauses_once_and_reads_results_in_call_order(capsys: pytest.CaptureFixture[str]) -> None:
    def model(turn: Turn) -> str:
        if not (found := results(turn)):
            return tool_call("get_weather", city="Oslo") + tool_call("get_time", city="Lima")
        return " | ".join(found)

    async with ScriptedEngine(model) as engine:
        answer = await example("parallel_tools").main(engine.engine)
    assert answer == '{"sky":"clear","temp":21} | error: get_time: LookupError: no clock in Lima'
    shown = capsys.readouterr().out
    assert shown.index("get_time after 0.0") < shown.index("get_weather after 0.5")
    assert shown.count("paused:") == 1


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_quickstart_pauses_rewinds_branches_and_tells_what_it_cost(capsys: pytest.CaptureFixture[str]) -> None:
    script = [
        tool_call("get_weather", city="Oslo"),
        "21 and clear.",
        tool_call("add", a=17, b=25),
        "42.",
        "3*3=9,9+5=14",
        *["3+3=6,6*5=30"] * 8,
    ]
    async with ScriptedEngine(script) as engine:
        costs = await example("quickstart").main(engine.engine)
        assert engine.live_branches == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("<")] == [
        "< 21 and clear.",
        "< 42.",
        "< 3*3=9,9+5=14  (one greedy try, wrong)",
        "< 3+3=6,6*5=30  (best of 8 branches, right)",
    ]
    assert all(usage.recomputed == 0 for _, usage in costs)
    assert costs[1][1].resumed > costs[0][1].resumed
    assert "rewinds to 'before the puzzle'" in shown


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_puzzles_are_solved_by_the_branch_that_scores(capsys: pytest.CaptureFixture[str]) -> None:
    def model(turn: Turn) -> str:
        numbers = re.findall(r"\d+", turn.log.rsplit("from", 1)[-1])
        one, two, three = (int(number) for number in numbers[:3])
        if turn.turn % 5:
            return "1+1=3"
        signs = {"+": one + two, "*": one * two}
        target = int(re.findall(r"Reach (\d+)", turn.log)[-1])
        for sign, value in signs.items():
            for second, end in (("+", value + three), ("-", value - three), ("*", value * three)):
                if end == target:
                    return f"{one}{sign}{two}={value},{value}{second}{three}={end}"
        return "0"

    async with ScriptedEngine(model) as engine:
        greedy, searched = await example("puzzles").main(engine.engine, 6)
    assert searched == 6
    assert greedy < 6
    assert "without" in capsys.readouterr().out


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_rollouts_have_the_ids_of_the_model_and_rewards_relative_to_their_group() -> None:
    def model(turn: Turn) -> str:
        asked = re.findall(r"What is (\d+) plus (\d+)", turn.log)[-1]
        if not results(turn):
            return tool_call("add", a=int(asked[0]), b=int(asked[1]))
        return f"It is {results(turn)[-1]}." if turn.turn % 3 else "I do not know."

    rollouts = example("rollouts")
    async with ScriptedEngine(model) as engine:
        found = await rollouts.main(engine.engine)
        assert engine.live_branches == 0
    assert len(found) == rollouts.GROUP * len(rollouts.SUMS)
    for start in range(0, len(found), rollouts.GROUP):
        lines = found[start : start + rollouts.GROUP]
        assert {line["reward_score"] for line in lines} == {0.5, 1.0}
        advantages = [line["extra_fields"]["advantage"] for line in lines]
        assert sum(advantages) == pytest.approx(0) and max(advantages) > 0 > min(advantages)
        assert len({tuple(line["prompt_ids"]) for line in lines}) == 1
    for line in found:
        parts = [line[name] for name in ("response_ids", "response_mask", "response_logprobs")]
        assert len({len(part) for part in parts}) == 1
        assert line["response_mask"][0] == 1 and 0 in line["response_mask"]
    assert rollouts.for_trl(found)["completion_ids"] == [line["response_ids"] for line in found]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_rewind_leaves_no_trace_of_a_failed_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    async with ScriptedEngine(["3+5=8,8+7=15", "5*7=35,35+3=38", "5+7=12,12*3=36"]) as engine:
        attempts = await example("rewind").main(engine.engine)
        assert engine.live_branches == 0
    assert attempts == 3
    assert "has 2 messages and no trace of the 2 failures" in capsys.readouterr().out


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_sixteen_agents_with_an_agent_inside_each_all_end_and_nothing_leaks(anyio_backend: str) -> None:
    def model(turn: Turn) -> str:
        if found := results(turn):
            return found[-1]
        city = re.findall(r"(?:for|in) (\w+)[.?]", turn.log)[-1]
        if "Search the web for" in turn.log:
            return tool_call("search", query=city)
        return tool_call("get_weather", city=city)

    subagents = example("subagents")
    async with ScriptedEngine(model) as engine:
        answers = await subagents.main(engine.engine)
        assert engine.live_branches == 0
    assert answers == [f"{len(city) + 10} degrees" for city in subagents.CITIES]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_the_same_agent_runs_under_trio(anyio_backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with ScriptedEngine([tool_call("add", a=17, b=25), "42"]) as engine:
        assert await example("under_trio").main(engine.engine) == "42"
    assert "running on trio" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test_mean.py", "./test_mean.py", "a/../test_mean.py", "TEST_mean.py", "other.py"])
def test_the_coding_agent_may_not_change_a_test_whatever_it_calls_the_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_mean.py").write_text("")
    (tmp_path / "other.py").symlink_to("test_mean.py")
    agent, text = example("coding_agent"), "print('all tests pass')  # " + "and more " * 20
    call = ToolCall(id="1", name="write_file", arguments=json.dumps({"name": name, "text": text}))
    assert not agent.approve(tmp_path, call).allow
    assert text in capsys.readouterr().out
    call = ToolCall(id="2", name="write_file", arguments=json.dumps({"name": "mean.py", "text": 'see "test_mean.py"'}))
    assert agent.approve(tmp_path, call).allow


SHOWN = {
    "coding_agent": ("may write_file run? no", "undone: the context is back", "mended after 2 attempts"),
    "mcp_client": ("the server has: add", "add: adding, 1 of 2", "add gave: 42", "get_weather: no station"),
    "research_agent": ("compacted: 3 messages", "mate", "the article: "),
    "rollouts": ("What is 986 plus 75?", "24 rollouts in", "for TRL: prompt_ids, completion_ids, logprobs, env_mask"),
    "web_chat": ("one     leaves after 3 events", 'one     calls get_weather({"city":"Oslo"})', "two < "),
}
"""What a run of an example must have done, as it says itself."""


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_every_example_is_one_line_to_run_and_takes_seconds(name: str) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "engine", "kernels")),
    }
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        env=environment,
        cwd=ROOT,
        timeout=100,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for words in SHOWN.get(name, ()):
        assert words in ran.stdout
    assert len(ran.stdout.splitlines()) >= 2
    assert max(map(len, ran.stdout.splitlines())) <= 100
