"""A coding agent over a folder: it asks before it writes, and a failed attempt is undone in the context and the files.

Before each attempt the session is marked and the folder committed to git. When the tests fail, `rewind` takes the
context back and `git reset` the files, so the next attempt begins as if the failed one had never been; what it was told
is one line. Without a model folder a script speaks for the model: the shipped one cannot program.

Run: `python examples/agents/coding_agent.py [MODEL FOLDER]`
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import anyio

from agentspeed import Approval, Engine, Mark, Session, ToolCall, ToolContext, tool
from agentspeed.testing import ScriptedEngine, tool_call

TASK = "The tests of this folder fail. Mend the code, not the tests."
ATTEMPTS = 3
FILES = {
    "mean.py": "def mean(numbers):\n    return sum(numbers) / 2\n",
    "test_mean.py": (
        "from mean import mean\n\nassert mean([1, 2, 3]) == 2, 'of three numbers'\n"
        "assert mean([]) == 0, 'of no numbers'\nprint('all tests pass')\n"
    ),
}


# ---- the folder -----------------------------------------------------------------------------------------------------
async def git(folder: Path, *arguments: str) -> str:
    """What the command says. Hooks and settings of the user's own stay out of it."""
    identity = ("-c", "user.name=agent", "-c", "user.email=agent@localhost", "-c", "core.hooksPath=/dev/null")
    done = await anyio.run_process(["git", "-C", str(folder), *identity, *arguments])
    return done.stdout.decode().strip()


async def commit(folder: Path) -> str:
    """The files as they are; the name under which `restore` finds them."""
    await git(folder, "add", "--all")
    await git(folder, "commit", "--quiet", "--allow-empty", "--message", "before an attempt")
    return await git(folder, "rev-parse", "HEAD")


async def restore(folder: Path, name: str) -> None:
    await git(folder, "reset", "--quiet", "--hard", name)
    await git(folder, "clean", "--quiet", "--force", "-d")


def inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or ".git" in path.parts:
        raise PermissionError(f"{name} is not in the folder")
    return path


# ---- what the agent may do ------------------------------------------------------------------------------------------
@tool
def list_files(context: ToolContext[Path]) -> list[str]:
    """The files of the folder."""
    return sorted(path.name for path in context.data.iterdir() if path.is_file())


@tool
def read_file(name: str, context: ToolContext[Path]) -> str:
    """A file's text."""
    return inside(context.data, name).read_text()


@tool(needs_approval=True)
def write_file(name: str, text: str, context: ToolContext[Path]) -> str:
    """Write a file."""
    _ = inside(context.data, name).write_text(text)
    return "written"


@tool(timeout=30)
async def run_tests(context: ToolContext[Path]) -> str:
    """Run the tests."""
    return await tests_of(context.data)


async def tests_of(folder: Path) -> str:
    done = await anyio.run_process(
        [sys.executable, "-B", "test_mean.py"], cwd=folder, check=False, stderr=subprocess.STDOUT
    )
    return done.stdout.decode().strip().splitlines()[-1]


def approve(folder: Path, call: ToolCall) -> Approval:
    """Here a rule; in a terminal you would ask, and show all of the arguments, as here. Tests may not be changed,
    whatever the file is called by: the model reads why."""
    given = json.loads(call.arguments)
    allowed = not inside(folder, given["name"]).name.lower().startswith("test_")
    print(f"    may {call.name} run? {'yes' if allowed else 'no'}")
    for name, value in given.items():
        print(*(f"        {name}: {line}" for line in str(value).splitlines()), sep="\n")
    return Approval(allow=allowed, reason="" if allowed else "the tests are not to be changed")


# ---- the agent ------------------------------------------------------------------------------------------------------
async def mend(s: Session, folder: Path) -> int:
    """Returns how many attempts it took; 0 when none of them passed."""
    prompt = TASK
    for attempt in range(1, ATTEMPTS + 1):
        mark, files = await s.mark(), await commit(folder)
        print(f"attempt {attempt}, from {mark.tokens} tokens")
        result = await s.run(prompt, tool_data=folder, approve=partial(approve, folder), max_turns=8, max_tokens=400)
        outcome = await tests_of(folder)
        spent = f"{result.usage.resumed} tokens resumed, {result.usage.computed} computed"
        print(f"    {len(result.tools)} calls, {spent}; tests: {outcome}")
        if outcome == "all tests pass":
            return attempt
        await undo(s, folder, mark, files)
        prompt = f"{TASK} An attempt that is undone failed with: {outcome}"
    return 0


async def undo(s: Session, folder: Path, mark: Mark, files: str) -> None:
    before = s.tokens
    await s.rewind(mark)
    await restore(folder, files)
    print(f"    undone: the context is back from {before} to {s.tokens} tokens, the files are those of {files[:7]}")


SCRIPT = [
    tool_call("list_files") + tool_call("read_file", name="mean.py") + tool_call("run_tests"),
    tool_call("write_file", name="test_mean.py", text="print('all tests pass')\n"),
    tool_call("write_file", name="mean.py", text="def mean(numbers):\n    return sum(numbers) / len(numbers)\n"),
    "It is mended.",
    tool_call("read_file", name="mean.py"),
    tool_call(
        "write_file",
        name="mean.py",
        text="def mean(numbers):\n    return sum(numbers) / len(numbers) if numbers else 0\n",
    ),
    tool_call("run_tests"),
    "It is mended, for no numbers too.",
]


async def work(engine: Engine) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, text in FILES.items():
            _ = (folder / name).write_text(text)
        await git(folder, "init", "--quiet")
        async with engine.session(tools=[list_files, read_file, write_file, run_tests]) as s:
            attempts = await mend(s, folder)
            print(f"mended after {attempts} attempts; the log has {len(s.messages)} messages, all of the last one")
            print((folder / "mean.py").read_text().splitlines()[-1].strip())
            return attempts


async def main(model: str | None = None) -> int:
    if model is None:
        async with ScriptedEngine(SCRIPT) as scripted:
            return await work(scripted.engine)
    async with Engine(model) as engine:
        return await work(engine)


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
