"""How a command ends: what it raises, as a sentence and an exit status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import anyio
import typer

from agentspeed import errors

EXIT_REFUSED, EXIT_BUG = 2, 70


@contextmanager
def reported() -> Iterator[None]:
    """What a command raises, as a sentence and a status: 2 refused (your input or the world), 70 a bug of ours, 130
    interrupted."""
    try:
        yield
    except errors.InternalError as error:
        typer.echo(f"{type(error).__name__}: {error}\nThis is a bug of agentspeed.", err=True)
        raise typer.Exit(EXIT_BUG) from error
    except errors.AgentspeedError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(EXIT_REFUSED) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


def run(call: Callable[[], Awaitable[None]]) -> None:
    """Runs a command on an event loop."""
    with reported():
        anyio.run(call)
