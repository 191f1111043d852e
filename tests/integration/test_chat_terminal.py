"""`agentspeed chat` as a person meets it, in a real terminal: typed lines, streamed answers, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentspeed.cli.chat import COMMANDS
from tests.support.engine_client import alive, environment, until
from tests.support.random_checkpoint import make_checkpoint
from tests.support.terminal import Terminal, terminal

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from agentspeed.cli import main; main()", "chat"]
SCRIPTED = """
import sys
from pathlib import Path
from anyio.from_thread import start_blocking_portal
from agentspeed.cli.chat import Chat
from agentspeed.testing import ScriptedEngine, say, tool_call

def asked(turn):
    return turn.log.rsplit('<|user|>', 1)[-1].split('<|end|>')[0]

with start_blocking_portal() as portal, portal.wrap_async_context_manager(ScriptedEngine({script})) as engine:
    tools = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    done = Chat(engine.engine, tools=tools, system=None, temperature=0.0, max_tokens=400).run()
sys.exit(0 if done else 2)
"""
TOOLS = '''
"""Tools of a test."""
import anyio
from agentspeed import ToolContext, tool


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
async def wait(seconds: float) -> str:
    """Wait."""
    await anyio.sleep(seconds)
    return "waited"


@tool
def read(lines: int, context: ToolContext[None]) -> str:
    """Read a file."""
    context.report(lines, lines, "lines read:")
    return "\\n".join(f"line {number} of the file" for number in range(lines))


@tool(needs_approval=True)
def pay(amount: int) -> str:
    """Pay an amount."""
    return f"paid {amount}"
'''
REUSE = re.compile(r"(\d+) tokens? resumed, (\d+) new.*?, (\d+) drawn: (\d+) computed")
ECHO = "lambda turn: f'heard {asked(turn)!r}'"
UP, LEFT = "\x1b[A", "\x1b[D"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    path = tmp_path / "tools.py"
    _ = path.write_text(TOOLS)
    return path


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a small context."""
    config = json.loads((ROOT / "bench/models/tiny.json").read_text())
    return make_checkpoint(config | {"max_position_embeddings": 1024}, tmp_path_factory.mktemp("narrow") / "model")


def scripted(script: str, *arguments: str | Path) -> list[str]:
    """A chat over an engine that says this: everything but the model is real."""
    return [sys.executable, "-c", SCRIPTED.format(script=script), *map(str, arguments)]


def piped(command: list[str], lines: str, status: int = 0) -> str:
    """What a chat prints that gets its lines from a pipe."""
    done = subprocess.run(
        command, input=lines, env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def ask(chat: Terminal, line: str) -> str:
    """Types it at the next prompt; what is shown until it is answered."""
    _ = chat.until("> ")
    chat.type(f"{line}\n")
    return chat.until(" computed")


def leave(chat: Terminal) -> None:
    """Ctrl-D at the next prompt ends the chat well."""
    _ = chat.until("> ")
    chat.type(Terminal.CTRL_D)
    assert chat.end() == 0
    assert "Traceback" not in chat.seen


def reuse(shown: str) -> tuple[int, int, int, int]:
    """(resumed, new, drawn, computed) of the last turn shown."""
    resumed, new, drawn, computed = map(int, REUSE.findall(shown)[-1])
    return resumed, new, drawn, computed


def test_answers_stream_and_each_turn_prints_what_was_resumed(checkpoint: Path) -> None:
    with terminal([*COMMAND, str(checkpoint), "--max-tokens", "12"], environment()) as chat:
        _ = chat.until("Ctrl-C cancels an answer, Ctrl-D ends.")
        first = reuse(ask(chat, "Hello there."))
        second = reuse(ask(chat, "And again."))
        leave(chat)
    assert first[0] == 0 and first[1] > 0 and 0 < first[2] <= 12
    assert first[3] == first[1] + first[2]
    assert second[0] >= first[1]


def test_an_answer_appears_word_by_word() -> None:
    script = "[say('one two three four five six seven eight nine ten eleven twelve', seconds=0.15)]"
    with terminal(scripted(script), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Count.\n")
        early = chat.until("two")
        assert "twelve" not in chat.seen and "drawn" not in early
        _ = chat.until("twelve")
        _ = chat.until("drawn")


def test_the_arrow_keys_edit_the_line_and_bring_back_earlier_ones() -> None:
    with terminal(scripted(ECHO), environment()) as chat:
        assert "heard 'Xab'" in ask(chat, f"ab{LEFT}{LEFT}X")
        assert "heard 'Xabc'" in ask(chat, f"{UP}c")
        leave(chat)


def test_what_is_pasted_is_one_question_whatever_lines_it_has() -> None:
    with terminal(scripted(ECHO), environment()) as chat:
        _ = chat.until("> ")
        chat.type("\x1b[200~one\ntwo\n\x1b[201~ three\n")
        assert "heard 'one\\ntwo\\n three'" in chat.until(" computed")
        leave(chat)


# ---- tools ----------------------------------------------------------------------------------------------------------
def test_tools_of_a_python_file_run_and_are_shown(tools: Path) -> None:
    with terminal(scripted("[tool_call('add', a=19, b=23), 'It is 42.']", tools), environment()) as chat:
        shown = ask(chat, "Add 19 and 23.")
        assert '[add {"a":19,"b":23}]' in shown and "[= 42]" in shown and "It is 42." in shown
        leave(chat)


def test_a_long_result_is_shown_by_its_beginning_and_is_whole_for_the_model(tools: Path) -> None:
    script = "lambda turn: 'I read line 199.' if 'line 199 of' in turn.log else tool_call('read', lines=200)"
    shown = piped(scripted(script, tools), "Read.\n")
    assert "[read: lines read: 200 of 200]" in shown
    assert "[= line 0 of the file\nline 1 of the file\n" in shown
    assert "line 9 of" not in shown
    assert re.search(r"\.\.\. \d+ characters more", shown)
    assert "I read line 199." in shown


def test_text_is_never_broken_at_the_width_of_the_terminal() -> None:
    script = "[' '.join(str(number) for number in range(100))]"
    assert " ".join(str(number) for number in range(100)) in piped(scripted(script), "Count.\n")


def test_a_call_that_needs_approval_runs_after_a_yes(tools: Path) -> None:
    with terminal(scripted("[tool_call('pay', amount=50), 'Done.']", tools), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Pay.\n")
        shown = chat.until("[y/N] ")
        assert 'May this run?  pay {"amount":50}' in shown and "paid" not in shown
        chat.type("y\n")
        assert "[= paid 50]" in chat.until(" computed")
        leave(chat)


@pytest.mark.parametrize("answer", ["\n", "n\n", "yup\n", Terminal.CTRL_D])
def test_a_call_that_needs_approval_does_not_run_after_anything_else(tools: Path, answer: str) -> None:
    with terminal(scripted("[tool_call('pay', amount=50), 'Not done.']", tools), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Pay.\n")
        _ = chat.until("[y/N] ")
        chat.type(answer)
        shown = chat.until(" computed")
        assert "not approved by the user" in shown and "Not done." in shown and "paid" not in shown
        leave(chat)


def test_what_was_typed_before_the_question_was_there_does_not_approve(tools: Path) -> None:
    script = "[tool_call('wait', seconds=0.6), tool_call('pay', amount=50), 'Not done.']"
    with terminal(scripted(script, tools), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Pay.\n")
        _ = chat.until("[wait")
        chat.type("y\n")
        _ = chat.until("[y/N] ")
        chat.type("\n")
        assert "Not done." in chat.until(" computed")
        leave(chat)


def test_ctrl_c_at_the_question_denies_and_cancels_the_answer(tools: Path) -> None:
    script = f"lambda turn: tool_call('pay', amount=50) if turn.turn == 1 else ({ECHO})(turn)"
    with terminal(scripted(script, tools), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Pay.\n")
        _ = chat.until("[y/N] ")
        chat.type(Terminal.CTRL_C)
        _ = chat.until("(cancelled; the chat goes on as if you had not asked)", 5.0)
        assert "heard 'Go on.'" in ask(chat, "Go on.")
        leave(chat)
    assert "paid" not in chat.seen


def test_two_calls_of_one_answer_are_asked_about_one_after_the_other(tools: Path) -> None:
    script = "[tool_call('pay', amount=1) + tool_call('pay', amount=2), 'Done.']"
    with terminal(scripted(script, tools), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Pay.\n")
        assert 'pay {"amount":1}' in chat.until("[y/N] ")
        chat.type("n\n")
        assert 'May this run?  pay {"amount":2}' in chat.until("[y/N] ")
        chat.type("y\n")
        shown = chat.until(" computed")
        assert "paid 2" in shown and "paid 1" not in shown
        leave(chat)


def test_without_a_terminal_nothing_is_approved_and_no_line_is_taken_for_an_answer(tools: Path) -> None:
    script = f"lambda turn: tool_call('pay', amount=50) if turn.turn == 1 else ({ECHO})(turn)"
    shown = piped(scripted(script, tools), "Pay.\ny\n")
    assert "no terminal is there to ask: not approved" in shown and "paid" not in shown
    assert "heard 'y'" in shown


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------
def test_ctrl_c_cancels_the_answer_and_keeps_the_chat() -> None:
    script = "[say('word ' * 200, seconds=0.1), 'The second answer.']"
    with terminal(scripted(script), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Talk.\n")
        _ = chat.until("word word")
        chat.type(Terminal.CTRL_C)
        _ = chat.until("(cancelled; the chat goes on as if you had not asked)", 5.0)
        assert "The second answer." in ask(chat, "Once more.")
        leave(chat)


def test_a_line_that_is_cancelled_after_a_tool_ran_leaves_nothing_in_the_log(tools: Path) -> None:
    script = (
        "lambda turn: [None, tool_call('add', a=1, b=2), tool_call('wait', seconds=60.0)][turn.turn] "
        "if turn.turn < 3 else f'log: {asked(turn)} {turn.log.count(asked(turn))} {turn.log.count(chr(39) * 2)} '"
        " + ('dirty' if 'Hold on.' in turn.log or 'error: cancelled' in turn.log else 'clean')"
    )
    with terminal(scripted(script, tools), environment()) as chat:
        _ = chat.until("> ")
        chat.type("Hold on.\n")
        _ = chat.until("[wait")
        chat.type(Terminal.CTRL_C)
        shown = chat.until("is not undone)", 5.0)
        assert "as if you had not asked, but what add and wait did is not undone)" in shown
        assert "clean" in ask(chat, "Go on.")
        leave(chat)


def test_ctrl_c_at_the_prompt_drops_the_line_and_keeps_the_chat() -> None:
    with terminal(scripted(ECHO), environment()) as chat:
        _ = chat.until("> ")
        chat.type("half a li")
        _ = chat.until("half a li")
        chat.type(Terminal.CTRL_C)
        assert "heard 'Whole.'" in ask(chat, "Whole.")
        leave(chat)


# ---- commands -------------------------------------------------------------------------------------------------------
def test_undo_goes_back_before_the_last_question_and_again_before_the_one_before() -> None:
    script = "lambda turn: f\"users {turn.log.count('<|user|>')}\""
    shown = piped(scripted(script), "One.\nTwo.\n/undo\nThree.\n/undo\n/undo\n/undo\nFour.\n")
    assert re.findall(r"users \d", shown) == ["users 1", "users 2", "users 2", "users 1"]
    assert "back to before: Two." in shown and "There is nothing to undo." in shown


def test_retry_asks_the_last_question_again_as_if_it_had_not_been_asked() -> None:
    script = "lambda turn: f'answer {turn.turn}, user {turn.log.count(chr(60) + chr(124) + chr(117))}'"
    shown = piped(scripted(script), "/retry\nOne.\nTwo.\n/retry\nThree.\n")
    assert "There is nothing to undo." in shown
    assert "answer 2, user 2" in shown and "back to before: Two." in shown
    assert "answer 3, user 2" in shown and "answer 4, user 3" in shown


def test_a_fork_is_another_way_on_and_back_leads_to_where_it_began() -> None:
    script = "lambda turn: f\"users {turn.log.count('<|user|>')}\""
    lines = "One.\n/fork\nTwo.\n/fork\nThree.\n/undo\n/undo\nFour.\n/back\n/back\nFive.\n/back\n/fork\n/quit\nSix.\n"
    shown = piped(scripted(script), lines)
    assert re.findall(r"users \d", shown) == [f"users {number}" for number in (1, 2, 3, 2, 2)]
    assert "back to before: Two." in shown
    assert shown.count("Back in the session that was forked.") == 2 and "This is no fork" in shown


def test_a_saved_session_is_loaded_with_its_questions_and_what_fails_leaves_the_chat_as_it_is(tmp_path: Path) -> None:
    script = "lambda turn: f\"users {turn.log.count('<|user|>')}\""
    other, saved = tmp_path / "notes.txt", tmp_path / "talk"
    _ = other.write_text("mine")
    lines = (
        f"One.\n/save {saved}\nTwo.\n/save {other}\n/save\n/load {other}\n/load {tmp_path}\n/load no file\nThree.\n"
        f"/load {saved}\n/undo\n/undo\nFour.\n/save {saved}\n"
    )
    shown = piped(scripted(script), lines, status=2)
    assert re.findall(r"users \d\n", shown) == [f"users {number}\n" for number in (1, 2, 3, 1, 1)]
    assert "assistant: users 1" in shown and "back to before: One." in shown and "nothing to undo" in shown
    assert shown.count("Nothing was saved") == 2 and shown.count("Nothing was loaded") == 2
    assert "This is no session snapshot" in shown and "Traceback" not in shown
    assert other.read_text() == "mine"


def test_one_question_is_answered_alone_on_standard_output() -> None:
    command = [*COMMAND, "--max-tokens", "12", "-p", "Hello!"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and done.stdout.strip()
    assert "tokens resumed" not in done.stdout and "Starting" not in done.stdout
    longer = subprocess.run(
        [*COMMAND, "-p", "word " * 9000], env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert (longer.returncode, longer.stdout) == (2, "")
    assert "ContextOverflow" in longer.stderr


def test_undo_says_that_what_tools_did_stays(tools: Path) -> None:
    shown = piped(scripted("[tool_call('add', a=1, b=2), 'Three.']", tools), "Add.\n/undo\n")
    assert "(back to before: Add., but what add did is not undone)" in shown


def test_new_begins_a_session_in_which_nothing_was_said() -> None:
    script = "lambda turn: f\"users {turn.log.count('<|user|>')}\""
    shown = piped(scripted(script), "One.\nTwo.\n/new\nThree.\n/undo\n/undo\n")
    assert re.findall(r"users \d", shown) == ["users 1", "users 2", "users 1"]
    assert "There is nothing to undo." in shown


def test_an_unknown_command_is_refused_with_the_list_and_the_model_does_not_hear_it() -> None:
    shown = piped(scripted(ECHO), "/nope\n/quit now\n//etc/hosts\n/quit\nafter\n", status=2)
    assert "There is no command /nope." in shown and "There is no command /quit now." in shown
    for name in COMMANDS:
        assert name in shown
    assert re.findall(r"heard '(.*?)'", shown) == ["/etc/hosts"]


def test_help_usage_and_tools_tell_what_they_should(tools: Path) -> None:
    shown = piped(scripted("['An answer.']", tools), "Hello.\n/help\n/usage\n/tools\n")
    for name, what in COMMANDS.items():
        assert f"{name:8}{what}" in shown
    assert re.search(r"\d+ of \d+ tokens of the context are used", shown) and "1 turn: " in shown
    assert "add(a, b)  Add two numbers." in shown and "pay(amount)  Pay an amount.  (asks you first)" in shown


def test_a_chat_whose_context_is_full_names_the_ways_out_and_goes_on(narrow: Path) -> None:
    most = "word " * 150
    shown = piped([*COMMAND, str(narrow), "--max-tokens", "4"], f"{most}\n{most}\n/undo\nAgain.\n", status=2)
    assert "leave no room in a context" in shown
    assert "the context is full: /undo goes back before your last question, /new begins a new session" in shown
    assert "the chat goes on as if you had not asked" in shown and "back to before: word" in shown
    assert len(REUSE.findall(shown)) == 2


@pytest.mark.parametrize("before", ["", "Short.\n"], ids=["at the beginning", "after another"])
def test_a_line_that_no_session_has_room_for_is_said_to_be_the_reason(narrow: Path, before: str) -> None:
    shown = piped([*COMMAND, str(narrow), "--max-tokens", "4"], f"{before}{'word ' * 400}\n", status=2)
    assert "this line alone does not fit into the context" in shown
    assert "/undo" not in shown and "/new" not in shown


# ---- scripts --------------------------------------------------------------------------------------------------------
def test_without_a_terminal_a_line_that_failed_makes_the_status_2_and_the_others_are_answered(narrow: Path) -> None:
    chat = [*COMMAND, str(narrow), "--max-tokens", "4"]
    assert len(REUSE.findall(piped(chat, f"One.\n{'word ' * 400}\n/new\nTwo.\n", status=2))) == 2
    assert len(REUSE.findall(piped(chat, "One.\n/nope\n", status=2))) == 1
    assert len(REUSE.findall(piped(chat, "One.\n/undo\n/undo\nTwo.\n"))) == 2


def test_at_a_terminal_a_line_that_failed_is_seen_and_the_chat_ends_well() -> None:
    with terminal(scripted(ECHO), environment()) as chat:
        _ = chat.until("> ")
        chat.type("/nope\n")
        _ = chat.until("There is no command /nope.")
        leave(chat)


def test_an_answer_that_was_cut_says_by_what(checkpoint: Path) -> None:
    assert "(cut: --max-tokens is 4)" in piped([*COMMAND, str(checkpoint), "--max-tokens", "4"], "Hello.\n")


# ---- engines --------------------------------------------------------------------------------------------------------
def test_a_chat_survives_the_death_of_its_engine(checkpoint: Path, tmp_path: Path) -> None:
    listed = environment() | {"AGENTSPEED_RUNTIME_DIR": str(tmp_path / "run")}
    with terminal([*COMMAND, str(checkpoint), "--max-tokens", "4"], listed) as chat:
        _ = ask(chat, "One.")
        os.kill(engine_pid(tmp_path / "run"), signal.SIGKILL)
        _ = ask(chat, "Two.")
        leave(chat)


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
