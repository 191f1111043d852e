"""The page of the command line says of every command what its own help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.testing import CliRunner

from agentspeed.cli.app import app
from tools.docs import cli_pages

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"


def test_every_command_has_its_options_and_its_first_sentence_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        section = text.split(f"\n## `agentspeed {name}`\n")[1].split("\n## ")[0]
        assert (command.callback.__doc__ or "").splitlines()[0] in section
        helped = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        for flag in {word for word in helped.replace(",", " ").split() if word.startswith("--")} - {"--help"}:
            assert flag in section, f"{name} has {flag}"


def test_a_command_is_written_as_it_is_called() -> None:
    made = typer.Typer(help="Does things.\n\nExample: none")

    @made.callback()
    def above() -> None:
        """Takes nothing."""

    @made.command()
    def copy_all(
        to: Annotated[str, typer.Argument(help="Where to.")],
        of: Annotated[list[str] | None, typer.Argument()] = None,
        *,
        as_json: Annotated[bool, typer.Option("--json", "-j", help="As JSON.")] = False,
        most_pages: Annotated[int, typer.Option(min=1)] = 0,
    ) -> None:
        """Copies.

        Example:  tool copy-all there

        And ends."""

    text = cli_pages.page(made, above)
    assert text.startswith("# Command line\n\nDoes things.\n\n| exit status |")
    assert "```text\nagentspeed copy-all [OPTIONS] TO [OF...]\n```\n\nCopies.\n\n```console\n$ tool copy-all" in text
    assert "And ends." in text and "| `TO` |  | Where to. |" in text and "| `--json, -j` |  | As JSON. |" in text
    assert "| `--most-pages NUMBER` | `0` | At least 1. |" in text
