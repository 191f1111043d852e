"""What `agentspeed replay` prints: a line for every step of a recorded run, or the whole state at one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import typer

from agentspeed import errors
from agentspeed._base.wording import counted
from agentspeed.cli.terminal_text import printable
from agentspeed.cli.top_rendering import rows_of
from agentspeed.transport.base import wire
from agentspeed.transport.recordings import NodeLine, Recording, ReplayDiffers, Step, crashes

EXIT_DIFFERS: Final = 1


def replay(path: Path, at: int | None) -> int:
    """Replays and prints; the exit status. Raises `InvalidRequest` for what is no recording, or has no step `at`."""
    recording = Recording(path)
    if at is None:
        typer.echo(printable(recording.about()))
    first: int | None = None
    last: int | None = None
    try:
        for step in recording.steps():
            first = step.seq if first is None else first
            last = step.seq
            if at is None:
                typer.echo(line_of(step))
            elif step.seq == at:
                typer.echo("\n".join((printable(recording.about()), line_of(step), "", *state_of(recording))))
                return 0
    except ReplayDiffers as difference:
        typer.echo(str(difference), err=True)
        return EXIT_DIFFERS
    if at is not None:
        have = "no step" if first is None else f"steps {first} to {last}"
        raise errors.InvalidRequest(f"{path} has no step {at}.", remedy=f"It has {have}.")
    for note in recording.notes:
        typer.echo(note, err=True)
    if recording.broke:
        typer.echo(printable(recording.broke))
    typer.echo(
        f"{counted(0 if first is None or last is None else last - first + 1, 'step')} replayed, "
        f"{counted(recording.compared, 'recorded digest')} equal"
    )
    return 0


def list_crashes(at: int | None) -> int:
    """Prints what engines that ended badly left, newest first; the exit status. Raises `InvalidRequest` for a step."""
    if at is not None:
        raise errors.InvalidRequest("--step needs a recording.", remedy="Name one; `agentspeed replay` lists them.")
    found = crashes()
    if not found:
        typer.echo("No engine of yours has left a recording: none ended badly.")
    for path, about in reversed(found):
        typer.echo(f"{path}  {printable(about)}")
    return 0


def line_of(step: Step) -> str:
    """One step, one line."""
    states = " ".join(f"{name} {count}" for name, count in step.states.items() if count)
    owners = " ".join(f"{name} {count}" for name, count in step.pages.items() if count)
    return (
        f"step {step.seq}  t {step.at:.6f}  rows {step.rows} tokens {step.tokens}  branches {states or 'none'}  "
        f"pages {owners}  slots free {step.slots_free}  leases {step.leases} (firm pages {step.firm_pages})  "
        f"queue {step.queue}  digest {step.digest}"
    )


def state_of(recording: Recording) -> Iterator[str]:
    """Branches as a tree with what they wait for, then nodes, then who owns pages, then counts."""
    picture = recording.picture()
    yield "branches"
    yield from _columns(
        [(row.name, row.state, row.known, row.rows, row.tail, row.lease, row.note) for row in rows_of(picture)],
        ("branch", "state", "tokens", "where its rows are", "tail", "lease", "what it does"),
    )
    yield ""
    yield "nodes"
    yield from _columns(
        [_node_cells(node) for node in recording.nodes()],
        ("node", "parent", "tokens", "state", "pages", "slots", "leaf of", "seed of", "pinned by"),
    )
    yield ""
    yield from _totals(picture)


def _node_cells(node: NodeLine) -> tuple[str, ...]:
    return (
        str(node.id),
        "root" if node.parent is None else str(node.parent),
        f"[{node.start}, {node.end})",
        node.state,
        _numbers(node.pages),
        _numbers(node.slots),
        _numbers(node.leaf_of),
        _numbers(node.seed_of),
        _numbers(node.pinned_by),
    )


def _totals(picture: wire.Picture) -> Iterator[str]:
    for name, values in (("pages", picture.pages), ("slots", picture.slots), ("counts", picture.counts)):
        yield f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items())


def _numbers(numbers: tuple[int, ...]) -> str:
    """Runs of consecutive numbers as first-last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _columns(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
