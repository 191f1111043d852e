"""`python -m agentspeed_engine.run`: one engine process on a Unix socket, ended by end of file on its stdin.

It prints one JSON line `{"ready": ...}` on stdout when it listens. What it refuses at start it says in one JSON line
`{"code", "message", "remedy"}` on stderr, with exit status 2; a bug of its own ends it with status 70.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from pathlib import Path

from agentspeed_engine.errors import EngineFault

_MALLOC = {
    # glibc hands large freed tensors back to the system and faults every page in again; keeping them is up to 2x.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
REFUSED, BROKEN = 2, 70


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m agentspeed_engine.run", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the Unix socket to listen on")
    parser.add_argument("--options", required=True, help="engine options as JSON (agentspeed_engine.run.options)")
    parser.add_argument("--keep-malloc", action="store_true", help="do not re-execute with tuned glibc malloc")
    arguments = parser.parse_args()
    if not arguments.keep_malloc and any(os.environ.get(name) != value for name, value in _MALLOC.items()):
        command = [sys.executable, "-m", "agentspeed_engine.run", *sys.argv[1:], "--keep-malloc"]
        os.execve(sys.executable, command, {**os.environ, **_MALLOC})
    try:
        return serve(Path(arguments.socket), arguments.options)
    except EngineFault as fault:
        print(json.dumps({"code": fault.code, "message": fault.message, "remedy": fault.remedy}), file=sys.stderr)
        return REFUSED


def serve(path: Path, options_text: str) -> int:
    """Loads, listens and runs until told to stop."""
    # Imported late: a wrong command line is answered before torch is loaded.
    from agentspeed_engine.run.loop import EngineLoop
    from agentspeed_engine.run.options import build, parse_options
    from agentspeed_engine.run.worker import Worker

    options = parse_options(options_text)
    built = build(options)
    loop = EngineLoop(built.core, Worker(built.model, built.vocabulary), outbox_bytes=options.outbox_bytes,
                      check=options.check_every_step)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        os.chmod(path, 0o600)
        server.listen(64)
        loop.listen(server)
        loop.stop_at_eof(sys.stdin.fileno())
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's; it ends us by end of file
        print(json.dumps({"ready": str(path), "pid": os.getpid()}), flush=True)
        try:
            loop.run()
        except Exception:  # the loop printed it and told every link; the status says that it was our bug
            return BROKEN
        finally:
            path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
