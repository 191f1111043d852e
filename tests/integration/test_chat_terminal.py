"""`agentspeed chat` as a person meets it, in a real terminal: typed lines, streamed answers, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from tests.engine_client import alive, environment, until
from tests.terminal import Terminal, terminal

COMMAND = [sys.executable, "-c", "from agentspeed.cli import main; main()", "chat"]
SCRIPTED = """
import sys
from pathlib import Path
import anyio
from agentspeed.cli.chatting import Chat
from agentspeed.testing import ScriptedEngine, say, tool_call

async def main():
    script = [{script}]
    async with ScriptedEngine(script) as engine:
        tools = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        await Chat(engine.engine, tools=tools, system=None, temperature=0.0, max_tokens=400).run()

anyio.run(main)
"""
TOOLS = '''
"""Tools of a test."""


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b
'''
REUSE = re.compile(r"(\d+) tokens resumed, (\d+) computed.*?, (\d+) drawn")


def scripted(script: str) -> list[str]:
    """A chat over an engine that says this: everything but the model is real."""
    return [sys.executable, "-c", SCRIPTED.format(script=script)]


def reuse(shown: str) -> tuple[int, int, int]:
    """(resumed, computed, drawn) of the last turn shown."""
    last = REUSE.findall(shown)[-1]
    return int(last[0]), int(last[1]), int(last[2])


def test_answers_stream_and_each_turn_prints_what_was_resumed(checkpoint: Path) -> None:
    with terminal([*COMMAND, str(checkpoint), "--max-tokens", "12"], environment()) as chat:
        _ = chat.until("Ctrl-C cancels an answer, Ctrl-D ends.")
        _ = chat.until("> ")
        chat.type("Hello there.\n")
        first = reuse(chat.until("drawn"))
        _ = chat.until("> ")
        chat.type("And again.\n")
        second = reuse(chat.until("drawn"))
        _ = chat.until("> ")
        chat.type(Terminal.CTRL_D)
        assert chat.end() == 0
    assert first[0] == 0 and first[1] > 0 and 0 < first[2] <= 12
    assert second[0] >= first[1]
    assert "Traceback" not in chat.seen


def test_an_answer_appears_word_by_word() -> None:
    script = "say('one two three four five six seven eight nine ten eleven twelve', seconds=0.15)"
    with terminal(scripted(script), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Count.\n")
        early = chat.until("two")
        assert "twelve" not in chat.seen and "drawn" not in early
        _ = chat.until("twelve")
        _ = chat.until("drawn")


def test_tools_of_a_python_file_run_and_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "tools.py"
    _ = path.write_text(TOOLS)
    with terminal([*scripted("tool_call('add', a=19, b=23), 'It is 42.'"), str(path)], environment()) as chat:
        _ = chat.until("> ")
        chat.type("Add 19 and 23.\n")
        shown = chat.until("It is 42.")
        assert '[add {"a":19,"b":23}]' in shown and "[= 42]" in shown
        _ = chat.until("drawn")
        chat.type(Terminal.CTRL_D)
        assert chat.end() == 0


def test_ctrl_c_cancels_the_answer_and_keeps_the_chat() -> None:
    script = "say('word ' * 200, seconds=0.1), 'The second answer.'"
    with terminal(scripted(script), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Talk.\n")
        _ = chat.until("word word")
        chat.type(Terminal.CTRL_C)
        _ = chat.until("(cancelled; the chat goes on as if you had not asked)", 5.0)
        _ = chat.until("> ")
        chat.type("Once more.\n")
        _ = chat.until("The second answer.")
        _ = chat.until("drawn")
        chat.type(Terminal.CTRL_D)
        assert chat.end() == 0
    assert "Traceback" not in chat.seen


def test_ctrl_c_during_a_tool_cancels_the_answer_too(tmp_path: Path) -> None:
    path = tmp_path / "tools.py"
    _ = path.write_text("import anyio\nasync def wait(seconds: float) -> str:\n    await anyio.sleep(seconds)\n"
                        "    return 'done'\n")
    script = "tool_call('wait', seconds=60.0), 'Later.'"
    with terminal([*scripted(script), str(path)], environment()) as chat:
        _ = chat.until("> ")
        chat.type("Wait.\n")
        _ = chat.until("[wait")
        chat.type(Terminal.CTRL_C)
        _ = chat.until("(cancelled", 5.0)
        _ = chat.until("> ")
        chat.type("Go on.\n")
        _ = chat.until("Later.")


def test_ctrl_c_at_the_prompt_drops_the_line_and_keeps_the_chat() -> None:
    with terminal(scripted("'An answer.'"), environment()) as chat:
        _ = chat.until("> ")
        chat.type("half a li")
        _ = chat.until("half a li")
        chat.type(Terminal.CTRL_C)
        _ = chat.until("> ")
        chat.type("Whole.\n")
        _ = chat.until("An answer.")
        _ = chat.until("drawn")
        chat.type(Terminal.CTRL_D)
        assert chat.end() == 0
    assert "Traceback" not in chat.seen


def test_a_chat_survives_the_death_of_its_engine(checkpoint: Path, tmp_path: Path) -> None:
    listed = environment() | {"AGENTSPEED_RUNTIME_DIR": str(tmp_path / "run")}
    with terminal([*COMMAND, str(checkpoint), "--max-tokens", "4"], listed) as chat:
        _ = chat.until("> ")
        chat.type("One.\n")
        _ = chat.until("drawn")
        _ = chat.until("> ")
        os.kill(engine_pid(tmp_path / "run"), signal.SIGKILL)
        chat.type("Two.\n")
        shown = chat.until("drawn")
        assert "Traceback" not in shown
        _ = chat.until("> ")
        chat.type(Terminal.CTRL_D)
        assert chat.end() == 0


def engine_pid(registry: Path) -> int:
    (entry,) = registry.glob("*.json")
    return int(entry.name.split("-")[0])


def test_the_engine_of_a_chat_ends_with_it(checkpoint: Path, tmp_path: Path) -> None:
    listed = environment() | {"AGENTSPEED_RUNTIME_DIR": str(tmp_path / "run")}
    with terminal([*COMMAND, str(checkpoint)], listed) as chat:
        _ = chat.until("> ")
        pid = engine_pid(tmp_path / "run")
        assert alive(pid)
        chat.type(Terminal.CTRL_D)
        assert chat.end() == 0
    until("the engine ended", lambda: not alive(pid))


def test_a_chat_with_a_model_that_is_none_ends_with_a_sentence_and_status_2(tmp_path: Path) -> None:
    with terminal([*COMMAND, str(tmp_path)], environment()) as chat:
        assert chat.end() == 2
    assert "tokenizer.json" in chat.seen and "Traceback" not in chat.seen
