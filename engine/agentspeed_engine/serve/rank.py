"""`python -m agentspeed_engine.serve.rank`: one rank beside rank 0, which starts it, tells it what to do and ends it.

It says on `--status` how far its start is, as an engine does: {"progress": ...}, {"doing": ...} for rank 0 alone, each
hundredth of its weights and each graph, so that it can be seen to hang; {"arrived": true}
where it is about to meet the others over torch.distributed, {"loaded": true} where it waits for an order to capture
graphs, then {"ready": true}; what it refuses
or fails by, at any time, is one line {"code", "message", "remedy"}, and where other ranks do not come it is {"left":
why, "late": the rank that did not, or null}. It ends when rank 0's end of its stdin is closed, whatever it is doing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Final, TextIO

import msgspec

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.serve import collector
from agentspeed_engine.serve.rank_options import Files, RankOptions, capture, loaded_shard, opened_group

_LOG: Final = logging.getLogger("agentspeed.engine")
_PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""
_BEATS: Final = 0.25
"""How often a rank says that it is at work, in parts of the time that it is waited for."""
REFUSED, LEFT, BROKEN = 2, 3, 70
"""Statuses: a fault with a name; another rank is lost; a bug."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m agentspeed_engine.serve.rank", description=__doc__)
    parser.add_argument("--options", required=True, help="all of them as one JSON object")
    for name in ("steps", "copies", "status"):
        parser.add_argument(f"--{name}", type=int, required=True, help="an open descriptor")
    parser.add_argument("--shared", action="store_true", help="ranks share memory; else torch.distributed is used")
    for name in ("tp-memory", "dp-memory"):
        parser.add_argument(
            f"--{name}", type=int, help="an open descriptor of it, where there is anybody to share with"
        )
    parser.add_argument("--leader", type=int, help="process id of rank 0, with which this one is killed on Linux")
    arguments = parser.parse_args()
    if arguments.leader is not None and sys.platform == "linux":
        _die_with(arguments.leader)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started the engine; we end when it does
    threading.Thread(target=_end_with_the_leader, name="agentspeed-end", daemon=True).start()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    options = msgspec.json.decode(arguments.options, type=RankOptions)
    with open(arguments.status, "w", encoding="utf-8") as status:
        try:
            return _run(options, arguments, status)
        except EngineFault as fault:
            _say(status, code=fault.code, message=fault.message, remedy=fault.remedy)
            return REFUSED


def _run(options: RankOptions, arguments: argparse.Namespace, status: TextIO) -> int:
    steps, copies = socket.socket(fileno=arguments.steps), socket.socket(fileno=arguments.copies)
    _say(status, progress="loading its piece")
    memory = Files(arguments.tp_memory, arguments.dp_memory) if arguments.shared else None
    with collector.at_rest():
        group = opened_group(options, memory, lambda: _say(status, arrived=True))
    # Imported late, with the tensors that they need.
    from agentspeed_engine.exec.ranks.follower import Follower
    from agentspeed_engine.exec.ranks.group import GroupBroken
    from agentspeed_engine.exec.ranks.launches import Launcher
    from agentspeed_engine.exec.ranks.orders import Channel
    from agentspeed_engine.exec.torch_model import TorchModel

    try:
        answers = options.dp_rank > 0 and options.rank % options.tp == 0
        heartbeat = _BEATS * options.seconds if answers else None
        model, orders = loaded_shard(options, group, _reading(status)), Channel(steps)
        launcher = None
        if options.launches:
            _say(status, loaded=True)
            if orders.receive() is None:  # rank 0 has ended
                return 0
            capture(
                options,
                model,
                lambda what: _say(status, progress=what),
                lambda count: _say(status, doing=f"capturing steps: {count} graphs"),
            )
            assert isinstance(model, TorchModel)
            launcher = Launcher(model, group, depth=options.depth, seconds=options.seconds)
        follower = Follower(model, group, orders, Channel(copies), heartbeat=heartbeat, launcher=launcher)
        collector.keep_what_is_loaded()
        _say(status, ready=True)
        follower.run()
    except GroupBroken as reason:
        _LOG.warning("ends: %s", reason)
        _say(status, left=str(reason), late=reason.late)
        return LEFT
    except EngineFault:
        raise
    except Exception as error:  # noqa: BLE001 - told to rank 0, which stops the engine by its name
        _LOG.critical("a bug of this rank", exc_info=error)
        _say(status, code="internal", message=f"{type(error).__name__}: {error}", remedy="This is a bug of the engine.")
        return BROKEN
    finally:
        group.abandon()
    return 0


def _die_with(leader: int) -> None:
    """Also where this process is stopped, or another one has inherited rank 0's end of stdin."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leader:  # it was gone before this was asked for
        sys.exit(LEFT)


def _end_with_the_leader() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # also in the middle of a step


def _reading(status: TextIO) -> Callable[[float], None]:
    said = 0

    def read(part: float) -> None:
        nonlocal said
        if int(100 * part) > said:
            said = int(100 * part)
            _say(status, doing=f"reading its weights: {said} %")

    return read


def _say(status: TextIO, **line: object) -> None:
    with contextlib.suppress(BrokenPipeError):  # rank 0 has ended: so will this one
        print(json.dumps(line), file=status, flush=True)


if __name__ == "__main__":
    sys.exit(main())
