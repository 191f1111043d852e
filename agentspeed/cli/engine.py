"""`agentspeed engine`: an engine that stays until it is told to end, for several programs to attach to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from agentspeed import errors
from agentspeed._core.engine_options import EngineOptions
from agentspeed._core.model_files import NANO
from agentspeed.cli.engine_flags import ranks_said
from agentspeed.cli.loading import loading
from agentspeed.transport.engine_process import ATTACH, EngineProcess
from agentspeed.transport.hub import resolve


def engine(model: str | None, *, revision: str | None, socket: Path | None, options: EngineOptions) -> None:
    """Blocks until Ctrl-C or SIGTERM. Raises what starting an engine raises, and `EngineDied` when it ended first."""
    typer.echo(f"Loading {model or 'nano, the shipped model'}{ranks_said(options)} ...", err=True)
    folder = resolve(NANO if model is None else model, revision)
    process = EngineProcess({"model": str(folder), **options})
    told = threading.Event()

    def end(signal_number: int, frame: FrameType | None) -> None:
        told.set()

    before = [(number, signal.signal(number, end)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        with loading() as line:
            process.await_readiness(line)
        with _at(process.socket_path, socket) as path:
            typer.echo(f"The engine {process.pid} listens. Programs attach to it with", err=True)
            typer.echo(f"export {ATTACH}={path}")
            typer.echo("Ctrl-C or SIGTERM ends it.", err=True)
            while not told.wait(0.2):
                if not process.alive:
                    raise errors.EngineDied(process.obituary() or "The engine ended.", remedy="Start it again.")
    finally:
        for number, handler in before:
            _ = signal.signal(number, handler)
        process.stop()


@contextmanager
def _at(made: Path, wanted: Path | None) -> Iterator[Path]:
    """The socket's path: a link to it where another was asked for. Raises `EngineStartFailed`."""
    if wanted is None:
        yield made
        return
    try:
        wanted.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.symlink(made, wanted)
    except OSError as error:
        raise errors.EngineStartFailed(
            f"{wanted} cannot be the engine's socket: {error.strerror}.", remedy="Give a path where nothing is yet."
        ) from error
    try:
        yield wanted.absolute()
    finally:
        wanted.unlink(missing_ok=True)
