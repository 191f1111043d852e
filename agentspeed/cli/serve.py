"""`agentspeed serve`: what is printed while the server starts and when it is ready; the work is `agentspeed.server`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from agentspeed import errors
from agentspeed._base.wording import counted
from agentspeed._core.engine_options import EngineOptions
from agentspeed.cli.engine_flags import ranks_said
from agentspeed.cli.loading import loading

if TYPE_CHECKING:
    from agentspeed.observing import Observer
    from agentspeed.server.turns import Service


def serve(
    model: str | None,
    *,
    revision: str | None,
    host: str,
    port: int,
    keys: Sequence[str],
    engine: EngineOptions,
    otel: bool,
    **limits: Any,
) -> None:
    """Blocks until the server ends. Raises `ExtraMissing` without the server's packages."""
    try:
        from agentspeed.server.options import ServerOptions, keys_from
        from agentspeed.server.serving import run
    except ImportError as error:
        raise errors.ExtraMissing(
            f"The server needs the package {error.name}, which is not installed.",
            remedy="Install agentspeed[engine,server].",
        ) from error
    options = ServerOptions(host=host, port=port, keys=keys_from(keys), **limits)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Each start names every kernel chosen, a screen of lines; warnings, as of a slower kernel, are still shown.
    logging.getLogger("agentspeed.engine").setLevel(logging.WARNING)
    cut = ranks_said(engine)
    typer.echo(f"Loading {model or 'nano, the shipped model'}{cut} ...", err=True)

    def ready(url: str, service: Service) -> None:
        secured = counted(len(options.keys), "API key") if options.keys else "no API key"
        typer.echo(
            "\n".join(
                (
                    f"agentspeed serves {service.model_name}{cut} at {url}",
                    f"  OpenAI: {url}/v1   Anthropic: {url}   {secured}, listening on {options.host}",
                    f"  at most {counted(options.max_requests, 'request')} at once; "
                    f"{counted(options.idle_sessions, 'conversation')} kept "
                    f"for {options.idle_seconds:g} s",
                    *([] if options.snapshots is None else [f"  sessions wait in {options.snapshots} after the end"]),
                )
            ),
            err=True,
        )

    given: dict[str, Any] = {"revision": revision, **engine}
    if otel:
        given["observer"] = _tracing()
    with loading() as line:

        def told(url: str, service: Service) -> None:
            line.end()
            ready(url, service)

        run(model, options, told, on_start=line, **given)


def _tracing() -> Observer:
    """Raises `ExtraMissing`."""
    try:
        from agentspeed.adapters.opentelemetry import Tracing
    except ImportError as error:
        raise errors.ExtraMissing(
            f"--otel needs the package {error.name}, which is not installed.", remedy="Install agentspeed[otel]."
        ) from error
    return Tracing()
