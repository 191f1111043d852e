"""The command line as its user meets it: output, refusals, exit statuses."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from typer.testing import CliRunner

import agentspeed
from agentspeed import errors
from agentspeed._base.validate import check_text
from agentspeed.cli.app import app
from agentspeed.cli.bench import names
from agentspeed.cli.chat import CancelSwitch, Chat, LineOutcome, Talk, tools_of
from agentspeed.cli.plan import memory_bytes
from agentspeed.cli.statuses import EXIT_BUG, EXIT_REFUSED, reported, run
from agentspeed.cli.terminal_text import decodable, encodable
from agentspeed.testing import ScriptedEngine

RUNNER = CliRunner()


def test_help_names_every_command_with_examples() -> None:
    done = RUNNER.invoke(app, ["--help"])
    assert done.exit_code == 0
    for name in ("chat", "demo", "env", "top", "bench"):
        assert name in done.output
    assert "agentspeed chat" in done.output


def test_whatever_the_output_cannot_encode_is_replaced_and_ends_no_command() -> None:
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="latin-1", errors="strict") as output:
        encodable(output)
        print("é ├ 検索 \ud800", file=output, flush=True)
        assert written.getvalue() == b"\xe9 | ?? ?\n"


def test_a_line_that_cannot_be_decoded_is_refused_when_it_is_used() -> None:
    with io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9\nYes\n"), encoding="ascii", errors="strict") as lines:
        decodable(lines)
        first, second = lines
    with pytest.raises(errors.InvalidRequest, match="line holds half a character"):
        check_text("line", first)
    check_text("line", second)


def test_env_prints_versions_and_every_option() -> None:
    done = RUNNER.invoke(app, ["env"])
    assert done.exit_code == 0, done.output
    for fact in ("torch", "page_tokens", "prefill_chunk", "cores"):
        assert fact in done.output


def test_bench_lists_its_names_and_refuses_others() -> None:
    assert {"sched", "fork", "turns"} <= set(names())
    assert RUNNER.invoke(app, ["bench"]).output.split() == names()
    assert RUNNER.invoke(app, ["bench", "nothing"]).exit_code == EXIT_REFUSED


def test_make_bench_runs_every_benchmark_and_no_module_beside_them() -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(["make", "--dry-run", "bench"], cwd=root, capture_output=True, text=True, check=True)
    (line,) = re.findall(r"for run in (.*?); do", done.stdout, re.DOTALL)
    assert sorted(entry.split()[0] for entry in shlex.split(line.replace("\\\n", ""))) == [
        name
        for name in names()
        if not name.startswith("gpu")
        and name not in ("json_schemas", "nccl", "pairs", "peers_gguf")  # a folder, two GPUs, an earlier tree, a file
    ]
    assert "pauses" in names() and "pauses_run" not in names()


def test_a_wrong_model_ends_with_a_sentence_and_status_2(tmp_path: Path) -> None:
    done = RUNNER.invoke(app, ["demo", str(tmp_path)])
    assert done.exit_code == EXIT_REFUSED
    assert "tokenizer.json" in done.output


def test_our_bug_has_a_status_of_its_own() -> None:
    async def broken() -> None:
        raise errors.InternalError("a rule was broken")

    with pytest.raises(Exception) as raised:
        run(broken)
    assert getattr(raised.value, "exit_code", None) == EXIT_BUG


def test_a_bug_during_a_chat_is_reported_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(talk: Talk, line: str, cancel: CancelSwitch) -> LineOutcome:
        raise errors.InternalError("a rule was broken")

    monkeypatch.setattr(Talk, "_answer", broken)
    monkeypatch.setattr("builtins.input", lambda prompt: "Hello.")
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(ScriptedEngine([])) as engine,
        pytest.raises(Exception) as raised,
        reported(),
    ):
        Chat(engine.engine, tools=None, system=None, temperature=0.0, max_tokens=4).run()
    assert getattr(raised.value, "exit_code", None) == EXIT_BUG


def test_a_first_line_whose_tools_filled_the_context_is_said_to_be_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def full(talk: Talk, line: str, cancel: CancelSwitch) -> LineOutcome:
        overflow = errors.ContextOverflow("4100 tokens leave no room in a context of 4096.")
        return LineOutcome(before=await talk._session.mark(), problems=(overflow,), undone=True)

    lines = ["Read.", "/quit"]
    monkeypatch.setattr(Talk, "_answer", full)
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(ScriptedEngine([])) as engine:
        assert not Chat(engine.engine, tools=None, system=None, temperature=0.0, max_tokens=4).run()
    shown = capsys.readouterr().out
    assert "this line with what its tools gave does not fit into the context" in shown and "/undo" not in shown


def test_tools_are_the_public_functions_a_file_defines(tmp_path: Path) -> None:
    path = tmp_path / "tools.py"
    _ = path.write_text("from json import dumps\ndef add(a: int) -> int:\n    return a\ndef _no() -> int: ...\n")
    assert [tool.name for tool in tools_of(path).tools] == ["add"]
    _ = path.write_text("x = 1\n")
    with pytest.raises(errors.InvalidRequest, match="no public functions"):
        tools_of(path)


def test_where_functions_are_decorated_the_others_are_left_out_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tools.py"
    _ = path.write_text(
        "from agentspeed import tool\n@tool(timeout=5)\ndef add(a: int) -> int:\n    return a\ndef sub(a: int): ...\n"
    )
    read = tools_of(path)
    assert [(tool.name, tool.timeout) for tool in read.tools] == [("add", 5)]
    assert read.left_out == ("sub: it has no @tool, and others in the file have",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def add(a, b): ...\n", "add: parameter 'a' has no type hint"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def f(:\n", "SyntaxError"),
        ("x = 1\n", "no public functions"),
        (None, "is not a file"),
    ],
)
def test_a_tools_file_that_cannot_be_used_is_a_sentence_and_not_a_traceback(
    tmp_path: Path, text: str | None, told: str
) -> None:
    path = tmp_path / "tools.py"
    if text is not None:
        _ = path.write_text(text)
    done = RUNNER.invoke(app, ["chat", "--tools", str(path)])
    assert done.exit_code == EXIT_REFUSED, done.exception
    assert told in done.output and str(path) in done.output
    assert "Starting" not in done.output


def test_the_version_can_be_asked_for() -> None:
    done = RUNNER.invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"agentspeed {agentspeed.__version__}\n")


MODELS = Path(__file__).parents[3] / "bench" / "models"


def test_kernels_shows_what_runs_each_op_and_why_the_others_do_not() -> None:
    given = ["kernels", str(MODELS / "qwen3-50m.json"), "--platform", "cpu:torch", "--dtype", "float32"]
    done = RUNNER.invoke(app, [*given, "--explain", "linear"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    assert ["gqa_rows", "any", "torch"] in lines
    assert any(line[:1] == ["not"] and "needs" in line for line in lines)


def test_kernels_for_programs_has_every_op_with_reasons() -> None:
    given = ["kernels", str(MODELS / "tiny.json"), "--platform", "cuda:100", "--dtype", "bfloat16", "--json"]
    found = json.loads(RUNNER.invoke(app, given).output)
    assert found["ops"]["linear"][0]["kernel"] == "triton" and found["ops"]["mla_rows"][0]["rejected"]


@pytest.mark.parametrize(("words", "said"), [
    (["--platform", "abacus"], "'abacus' is no platform"),
    (["--explain", "sum"], "no op 'sum'"),
    (["--platform", "cuda:100", "--weights", "int8"], "no kernel for linear"),
])  # fmt: skip
def test_kernels_refuses_what_it_cannot_answer_with_a_sentence(words: list[str], said: str) -> None:
    done = RUNNER.invoke(app, ["kernels", str(MODELS / "tiny.json"), *words])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


@pytest.mark.parametrize(("asked", "said"), [
    ("foo", "AGENTSPEED_KERNELS is wrong: 'foo' names no choice of kernels. Write op=name to force one"),
    ("-linear/torch", "no kernel for linear in float32"),
])  # fmt: skip
def test_kernels_refuses_wishes_that_leave_no_choice_with_what_may_be_written(
    asked: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTSPEED_KERNELS", asked)
    given = ["kernels", str(MODELS / "tiny.json"), "--platform", "cpu:torch", "--dtype", "float32"]
    done = RUNNER.invoke(app, given)
    assert done.exit_code == 2
    shown = " ".join(done.output.split())
    assert said in shown and "AGENTSPEED_KERNELS" in shown


def test_a_plan_and_a_list_of_kernels_say_that_the_cache_is_in_fp8() -> None:
    """Of each layer the latent numbers, a scale with its padding, and the turned numbers in bfloat16."""
    config = json.loads((MODELS / "tiny.json").read_text())
    row = config["kv_lora_rank"] + 16 + 2 * config["qk_rope_head_dim"]
    given = [str(MODELS / "tiny.json"), "--kv-cache-dtype", "fp8"]
    planned = RUNNER.invoke(app, ["plan", *given]).output
    assert "bfloat16, cache in fp8" in planned
    assert f"cache        {config['num_hidden_layers'] * row:,} B a token" in planned
    listed = RUNNER.invoke(app, ["kernels", *given, "--platform", "cpu:torch"]).output
    assert "cache in fp8" in listed
    assert ["mla_rows", "any", "torch-fp8-cache"] in [line.split() for line in listed.splitlines()]


def test_plan_shows_a_model_on_its_ranks_without_any_weights() -> None:
    done = RUNNER.invoke(app, ["plan", str(MODELS / "tiny.json"), "--tp", "2", "--memory", "1GB"])
    assert done.exit_code == 0, done.output
    for fact in ("tp 2, dp 1", "all_reduce over tp", "largest context of a session", "where the next cut fails"):
        assert fact in done.output


def test_plan_for_programs_has_every_step() -> None:
    done = RUNNER.invoke(app, ["plan", str(MODELS / "tiny.json"), "--tp", "2", "--rows", "3", "--json"])
    shown = json.loads(done.output)
    layers = json.loads((MODELS / "tiny.json").read_text())["num_hidden_layers"]
    assert [step["kind"] for step in shown["steps"]].count("all_reduce") == shown["launches"] - 1 == 1 + 2 * layers
    assert shown["steps"][0]["before"] == [3] and shown["room"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.json"], "nowhere.json does not exist"),
        ([str(MODELS / "tiny.json"), "--tp", "7"], "does not divide by 7 ranks"),
        ([str(MODELS / "tiny.json"), "--memory", "lots"], "'lots' is no size of a memory"),
        ([str(MODELS / "tiny.json"), "--memory", "0GB"], "A memory of no bytes"),
        ([str(MODELS / "tiny.json"), "--context", "999999999"], "longer than the model's context"),
    ],
)
def test_plan_refuses_what_cannot_be_planned_with_a_sentence(words: list[str], said: str) -> None:
    done = RUNNER.invoke(app, ["plan", *words])
    assert done.exit_code == EXIT_REFUSED and said in done.output


def test_a_memory_is_written_with_decimal_or_binary_units() -> None:
    assert [memory_bytes(given) for given in ("141GB", "1.5 kb", "80GiB", "7")] == [141 * 10**9, 1500, 80 * 2**30, 7]
