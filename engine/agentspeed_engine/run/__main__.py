"""`python -m agentspeed_engine.run`: one engine process on a Unix socket, ended by end of file on its stdin.

    python -m agentspeed_engine.run --socket /run/user/1000/agentspeed/engine.sock --model FOLDER --pages 4096

Options come as flags, or all at once as JSON with `--options`; `run.options.EngineOptions` lists them. While it loads
it prints JSON lines {"progress": ...} on stdout, then one line {"ready": ..., "pid": ..., "recording": ...} when it
listens. What it refuses at start it says in one JSON line {"code", "message", "remedy"} on stderr, with exit status 2;
a bug of its own ends it with status 70 and a traceback on stderr. SIGTERM and end of file on stdin end it with status 0
(with `--stay` only SIGTERM does).

It re-executes itself once with an environment that glibc and OpenMP read only at start: malloc keeps large blocks,
which saves the page faults of every step, and threads spin only shortly at barriers (GOMP_SPINCOUNT), so that another
busy process does not stop decoding. What the environment says already stays as it is, and OMP_WAIT_POLICY keeps
GOMP_SPINCOUNT out; set AGENTSPEED_MALLOC to anything to run with the environment exactly as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, final

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.run import crashes, registry
from agentspeed_engine.run.options import EngineOptions, build, options_from, parse_options, recording_of

_MALLOC_SWITCH = "AGENTSPEED_MALLOC"
_MALLOC = {
    # glibc hands large freed tensors back to the system and faults every page in again; keeping them is up to 2x.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
_SPINS = {"GOMP_SPINCOUNT": "1000"}
"""As `agentspeed.transport.engine_process` gives it to the engines that it starts; there is why."""
REFUSED, BROKEN = 2, 70
_LONGEST_SOCKET_PATH = 107
"""Bytes; `sun_path` of Linux without its final zero."""


@final
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EngineFault("bad_options", f"The command line is wrong: {message}.",
                          "`python -m agentspeed_engine.run --help` lists the options.")


def main() -> int:
    # Whoever starts engines may have set these already: then one start is enough.
    tuning = _MALLOC if "OMP_WAIT_POLICY" in os.environ else _MALLOC | _SPINS
    if _MALLOC_SWITCH not in os.environ and any(name not in os.environ for name in tuning):
        environment = {**tuning, **os.environ, _MALLOC_SWITCH: "tuned"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    try:
        arguments = parse_arguments()
        return serve(Path(arguments.socket), read_options(arguments), stay=arguments.stay)
    except EngineFault as fault:
        print(json.dumps({"code": fault.code, "message": fault.message, "remedy": fault.remedy}), file=sys.stderr)
        return REFUSED


def parse_arguments() -> argparse.Namespace:
    parser = _Parser(prog="python -m agentspeed_engine.run", description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", required=True, help="path of the Unix socket to listen on")
    parser.add_argument("--stay", action="store_true", help="do not end at end of file on stdin")
    parser.add_argument("--options", help="all engine options as one JSON object, instead of flags")
    for field in msgspec.structs.fields(EngineOptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=f"option_{field.name}", metavar="VALUE")
    return parser.parse_args()


def read_options(arguments: argparse.Namespace) -> EngineOptions:
    flags: dict[str, Any] = {
        name.removeprefix("option_"): value
        for name, value in vars(arguments).items() if name.startswith("option_") and value is not None
    }
    if arguments.options is None:
        return options_from(flags)
    if flags:
        raise EngineFault("bad_options", f"--options and --{next(iter(flags))} are both given.", "Give one of the two.")
    return parse_options(arguments.options)


def serve(path: Path, options: EngineOptions, *, stay: bool) -> int:
    """Loads, listens and runs until told to stop."""
    # Imported late: what is wrong with a command line is answered before anything heavy is loaded.
    from agentspeed_engine.run.loop import EngineLoop

    if not stay and not _ends(sys.stdin.fileno()):
        raise EngineFault("bad_options", "stdin is neither a pipe, a socket nor a terminal, so its end cannot be seen.",
                          "Start the engine with a pipe as stdin, or with --stay.")
    server = listen_at(path)
    try:
        loop = EngineLoop(build(options, lambda what: _say(progress=what)), outbox_bytes=options.outbox_bytes,
                          check=options.check_every_step, idle_seconds=options.idle_seconds,
                          recording=recording_of(options, crashes=crashes.folder(os.environ)))
        recording = None if loop.recording is None else str(loop.recording)
        if recording is not None and options.record != "crash":
            print(f"recording into {recording}", file=sys.stderr, flush=True)
        loop.listen(server)
        if not stay:
            loop.stop_at_eof(sys.stdin.fileno())
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's; it ends us by end of file
        gc.collect()
        gc.freeze()  # what is loaded stays: no later collection walks over it in the middle of a step
        with _listed(path, options.model):
            _say(ready=str(path), pid=os.getpid(), recording=recording)
            try:
                loop.run()
            except Exception:  # noqa: BLE001 - the loop printed it and told every link; the status says it was our bug
                return BROKEN
    finally:
        server.close()
        path.unlink(missing_ok=True)
    return 0


@contextlib.contextmanager
def _listed(path: Path, model: str) -> Iterator[None]:
    """In the user's registry meanwhile. An engine that cannot be listed serves all the same."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(registry.entered(registry.folder(os.environ), registry.Entry(os.getpid(), path, model)))
        except OSError as error:
            _say(progress=f"not listed for `agentspeed top`: {error}")
        yield


def listen_at(path: Path) -> socket.socket:
    """A socket only its owner can reach. Raises `EngineFault` when the path cannot be used."""
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise EngineFault("bad_options", f"The socket path {path} is longer than {_LONGEST_SOCKET_PATH} bytes.",
                          "Use a shorter folder.")
    if path.exists() and registry.answers(path):
        raise EngineFault("bad_options", f"An engine is already listening at {path}.", "Use another path.")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)  # from its first moment on, nobody else reaches the socket
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


def _say(**line: object) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
