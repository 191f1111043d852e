"""`python -m agentspeed_engine.serve`: one engine process on a Unix socket, ended by end of file on its stdin.

    python -m agentspeed_engine.serve --socket /run/user/1000/agentspeed/engine.sock --model FOLDER --pages 4096

Options come as flags, or all at once as JSON with `--options`; `serve.options.EngineOptions` lists them. While it loads
it writes JSON lines {"progress": ...} in words and {"part": ...} of the weights, then one line {"ready": ...,
"pid": ..., "recording": ...} when it listens: to
the descriptor of `--status-fd`, which it closes then, or to stdout. What it refuses at start it says there too, in one
JSON line {"code", "message", "remedy"} (without `--status-fd` on stderr), and ends with status 2; a bug of its own ends
it with status 70 and a traceback in its log, which is stderr. SIGTERM and end of file on stdin end it with status 0
(with `--stay` only SIGTERM does).

It re-executes itself once with an environment that glibc and OpenMP read only at start: malloc keeps large blocks,
which saves the page faults of every step, and threads spin only shortly at barriers (GOMP_SPINCOUNT), so that another
busy process does not stop decoding. What the environment says already stays as it is, and OMP_WAIT_POLICY keeps
GOMP_SPINCOUNT out; set AGENTSPEED_MALLOC to anything to run with the environment exactly as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO, final

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.protocol.credential import credential
from agentspeed_engine.serve import collector, crashes, engine_registry, tuning
from agentspeed_engine.serve.options import EngineOptions, build, options_from, parse_options, recording_of

_LOG: Final = logging.getLogger("agentspeed.engine")
REFUSED, BROKEN = 2, 70
_LONGEST_SOCKET_PATH = 107
"""Bytes; `sun_path` of Linux without its final zero."""


@final
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EngineFault(
            "bad_options",
            f"The command line is wrong: {message}.",
            "`python -m agentspeed_engine.serve --help` lists the options.",
        )


def main() -> int:
    # The process that starts engines may have tuned their environment already: then one start is enough.
    tuned = tuning.tuned(os.environ)
    if tuned != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], tuned | {tuning.SWITCH: "tuned"})
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        arguments = parse_arguments()
        status = _Status(arguments.status_fd)
    except EngineFault as fault:
        _Status(None).refuse(fault)
        return REFUSED
    try:
        return serve(
            Path(arguments.socket),
            read_options(arguments),
            status,
            stay=arguments.stay,
            own_folder=arguments.own_folder,
        )
    except EngineFault as fault:
        status.refuse(fault)
        return REFUSED


def parse_arguments() -> argparse.Namespace:
    parser = _Parser(
        prog="python -m agentspeed_engine.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--socket", required=True, help="path of the Unix socket to listen on")
    parser.add_argument("--stay", action="store_true", help="do not end at end of file on stdin")
    parser.add_argument(
        "--own-folder",
        action="store_true",
        help="remove the socket's folder, which holds nothing else, with the socket",
    )
    parser.add_argument("--status-fd", type=int, help="descriptor to say on how far the start is; else stdout")
    parser.add_argument("--options", help="all engine options as one JSON object, instead of flags")
    for field in msgspec.structs.fields(EngineOptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=f"option_{field.name}", metavar="VALUE")
    return parser.parse_args()


def read_options(arguments: argparse.Namespace) -> EngineOptions:
    flags: dict[str, Any] = {
        name.removeprefix("option_"): value
        for name, value in vars(arguments).items()
        if name.startswith("option_") and value is not None
    }
    if arguments.options is None:
        return options_from(flags)
    if flags:
        raise EngineFault("bad_options", f"--options and --{next(iter(flags))} are both given.", "Give one of the two.")
    return parse_options(arguments.options)


def serve(path: Path, options: EngineOptions, status: _Status, *, stay: bool, own_folder: bool) -> int:
    """Loads, listens and runs until told to stop. Raises `EngineFault` for what cannot be served."""
    # Imported late: what is wrong with a command line is answered before anything heavy is loaded.
    from agentspeed_engine.serve.loop import EngineLoop

    if not stay and not _ends(sys.stdin.fileno()):
        raise EngineFault(
            "bad_options",
            "stdin is neither a pipe, a socket nor a terminal, so its end cannot be seen.",
            "Start the engine with a pipe as stdin, or with --stay.",
        )
    secret = credential(os.environ)
    server = listen_at(path)
    try:
        built = build(options, lambda what: status.say(progress=what), lambda read: status.say(part=read))
        try:
            loop = EngineLoop(
                built,
                outbox_bytes=options.outbox_bytes,
                check=options.check_every_step,
                idle_seconds=options.idle_seconds,
                recording=recording_of(options, crashes=crashes.folder(os.environ)),
                credential=secret,
            )
        except BaseException:
            built.close()
            raise
        # One for each dp rank; whoever is told writes the command before it.
        recording = "; agentspeed replay ".join(map(str, loop.recordings)) or None
        if recording is not None and options.record != "crash":
            _LOG.info("recording into %s", recording)
        loop.listen(server)
        if not stay:
            loop.stop_at_eof(sys.stdin.fileno())
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's; it ends us by end of file
        collector.keep_what_is_loaded()
        with _listed(path, options.model):
            status.say(ready=str(path), pid=os.getpid(), recording=recording)
            status.close()
            try:
                loop.run()
            except Exception:  # noqa: BLE001 - the loop logged it and told every link; the status says it was our bug
                return BROKEN
    finally:
        server.close()
        path.unlink(missing_ok=True)
        if own_folder:
            with contextlib.suppress(OSError):  # gone already, or another program put something there
                path.parent.rmdir()
    return 0


@contextlib.contextmanager
def _listed(path: Path, model: str) -> Iterator[None]:
    """In the user's registry meanwhile. An engine that cannot be listed serves all the same."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                engine_registry.entered(
                    engine_registry.folder(os.environ), engine_registry.RunningEngine(os.getpid(), path, model)
                )
            )
        except OSError as error:
            _LOG.warning("not listed for `agentspeed top`: %s", error)
        yield


def listen_at(path: Path) -> socket.socket:
    """A socket only its owner can reach. Raises `EngineFault` when the path cannot be used."""
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise EngineFault(
            "bad_options",
            f"The socket path {path} is longer than {_LONGEST_SOCKET_PATH} bytes.",
            "Give --socket a path in a folder with a shorter name.",
        )
    if path.exists() and engine_registry.answers(path):
        raise EngineFault("bad_options", f"An engine is already listening at {path}.", "Use another path.")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)  # from its first moment on, no other user reaches the socket
        try:
            server.bind(str(path))
        finally:
            os.umask(mask)
        server.listen(64)
    except OSError as error:
        server.close()
        raise EngineFault("bad_options", f"Cannot listen at {path}: {error}.", "Use a folder of your own.") from error
    return server


def _ends(descriptor: int) -> bool:
    """Whether end of file on it is an event (a regular file and /dev/null are at their end from the start)."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)


@final
class _Status:
    """Where the start is reported: a pipe of its own, or the standard streams for those who start an engine by hand."""

    def __init__(self, descriptor: int | None) -> None:
        """Raises `EngineFault` for a number that is no open descriptor."""
        self._out: TextIO | None = None
        if descriptor is not None:
            try:
                os.set_inheritable(descriptor, False)
                self._out = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115 - closed when the engine is ready
            except OSError as error:
                raise EngineFault(
                    "bad_options", f"--status-fd is {descriptor}: {error}.", "Give an open descriptor, or leave it out."
                ) from error

    def say(self, **line: object) -> None:
        self._print(json.dumps(line), sys.stdout)

    def refuse(self, fault: EngineFault) -> None:
        line = {"code": fault.code, "message": fault.message, "remedy": fault.remedy}
        self._print(json.dumps(line), sys.stderr)

    def close(self) -> None:
        if self._out is not None:
            self._out.close()

    def _print(self, line: str, otherwise: TextIO) -> None:
        # The starter may be gone: then the end of stdin ends this engine.
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._out or otherwise, flush=True)


if __name__ == "__main__":
    sys.exit(main())
