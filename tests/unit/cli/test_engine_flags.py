"""What engine a command is told to start: by the same words everywhere, as the engine's options."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from agentspeed import Engine, Session, errors
from agentspeed._core.engine_options import EngineOptions
from agentspeed.cli import app, engine_flags
from agentspeed.cli.app import app as commands
from agentspeed.cli.engine_flags import at_revision, engine_options_of, ranks_said
from agentspeed.cli.statuses import EXIT_REFUSED

RUNNER = CliRunner()
CONFIG = str(Path(__file__).parents[3] / "bench/models/tiny.json")


@pytest.mark.parametrize(
    ("named", "options", "shown"),
    [
        ({"tp": 1, "dp": 1, "ep": None, "batch_invariant": False, "pages": None}, {}, ""),
        ({"tp": 2, "dp": 1}, {"tp": 2}, " on 2 ranks"),
        ({"tp": 2, "dp": 2, "ep": 4}, {"tp": 2, "dp": 2, "ep": 4}, " on 4 ranks"),
        ({"tp": 1, "ep": 1, "host_slots": 0}, {"ep": 1, "host_slots": 0}, ""),
        ({"batch_invariant": True, "weights": "dtype"}, {"batch_invariant": True, "weights": "dtype"}, ""),
    ],
)
def test_an_engine_is_asked_for_what_says_more_than_nothing(
    named: dict[str, Any], options: dict[str, Any], shown: str
) -> None:
    found = engine_options_of(None, **named)
    assert found == options
    assert ranks_said(found) == shown


def test_settings_are_values_or_texts_and_the_names_of_options() -> None:
    found = engine_options_of(["device=cpu", "max_sessions=64", "idle_seconds=null"], pages=5)
    assert found == {"pages": 5, "device": "cpu", "max_sessions": 64, "idle_seconds": None}
    with pytest.raises(errors.InvalidRequest, match=r"--set pages has no value.*Write NAME=VALUE"):
        engine_options_of(["pages"])
    with pytest.raises(errors.InvalidRequest, match="Do you mean pages"):
        engine_options_of(["page=5"])


def test_the_words_are_those_of_the_engine() -> None:
    of_engine = get_type_hints(EngineOptions)
    for name, words in {
        "dtype": engine_flags.DtypeWord, "weights": engine_flags.WeightsWord,
        "kv_cache_dtype": engine_flags.CacheWord,
    }.items():  # fmt: skip
        assert get_args(words) == get_args(of_engine[name]), name


@pytest.mark.parametrize("command", [app.chat, app.serve, app.engine])
def test_every_command_that_starts_an_engine_takes_the_same_of_it(command: Any) -> None:
    taken = get_type_hints(command, include_extras=True)
    for name in ("revision", "pages", "dtype", "weights", "kv_cache_dtype", "batch_invariant", "context", "host_slots",
                 "tp", "dp", "ep", "settings"):  # fmt: skip
        assert name in inspect.signature(command).parameters, name
        assert taken[name] is getattr(engine_flags, "".join(map(str.title, name.split("_")))), name


@pytest.mark.parametrize("command", ["chat", "serve", "engine", "kernels", "plan"])
@pytest.mark.parametrize("option", ["--kv-cache-dtype", "--weights", "--dtype"])
def test_a_word_that_is_none_is_refused_with_those_there_are_before_anything_starts(command: str, option: str) -> None:
    given = [command, CONFIG, option, "int3"]
    done = RUNNER.invoke(commands, given)
    said = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == EXIT_REFUSED and "'int3' is not one of" in said and "Loading" not in said


@pytest.mark.parametrize("command", ["kernels", "plan"])
def test_dtype_as_a_format_says_what_nothing_says(command: str) -> None:
    plain = RUNNER.invoke(commands, [command, CONFIG, "--dtype", "bfloat16"])
    given = [command, CONFIG, "--dtype", "bfloat16", "--weights", "dtype", "--kv-cache-dtype", "dtype"]
    said = RUNNER.invoke(commands, given)
    assert plain.exit_code == said.exit_code == 0, said.output
    assert said.output == plain.output


@pytest.mark.parametrize("alone", [["-p", "Hello!"], []])
def test_a_chat_starts_the_engine_that_it_is_told(alone: list[str]) -> None:
    """Each of these is refused by the engine, so it has been asked for it."""
    for words, said in (
        (["--context", "9999999"], "context_limit is 9999999"),
        (["--weights", "int8", "--batch-invariant"], "int8"),
        (["--pages", "1"], "1 page"),
        (["--set", "max_links=0"], "max_links is 0"),
    ):
        done = RUNNER.invoke(commands, ["chat", *alone, *words])
        assert done.exit_code == EXIT_REFUSED and said in done.output, done.output


def test_a_revision_is_of_a_repository(tmp_path: Path) -> None:
    assert at_revision("owner/name", None) == "owner/name" and at_revision(None, None) is None
    for model in (None, str(tmp_path)):
        with pytest.raises(errors.InvalidRequest, match=r"revision is 'v1'.* a folder, which has no revisions"):
            at_revision(model, "v1")
    for command in ("chat", "serve", "engine", "kernels"):
        done = RUNNER.invoke(commands, [command, str(tmp_path), "--revision", "v1"])
        assert done.exit_code == EXIT_REFUSED and "which has no revisions" in done.output, command


def test_a_server_has_a_model_of_its_own() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"Leave out revision, pages"):
        Engine("http://127.0.0.1:1", revision="v1", pages=5)
    with pytest.raises(errors.InvalidRequest, match=r"server's address.*Give a model folder or a repository id"):
        at_revision("http://127.0.0.1:1", "v1")


def test_a_session_says_where_what_is_for_engines_goes() -> None:
    options: Any = {"revision": "v1", "api_key": "k"}
    with pytest.raises(errors.InvalidRequest, match=r"no api_key and no revision.*Engine\(model, api_key=\.\.\., re"):
        Session("owner/name", **options)


def test_the_list_of_commands_loads_neither_the_session_nor_the_hub() -> None:
    """`agentspeed top` and `--help` would wait for them."""
    code = (
        "import sys, agentspeed.cli.app; sys.exit(any(name in sys.modules for name in ('httpx', 'agentspeed.session')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
