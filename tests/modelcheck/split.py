"""One search over several processes: each level of states is dealt out, and what was found is taken in its order."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from agentspeed_engine.sched.core import Core
from tests.modelcheck.explorer import Bounds, Expand, Expanded, begin, expand
from tests.modelcheck.packing import packed, unpacked

Tokens: TypeAlias = AbstractContextManager[Any]
_FEW = 256
_MANY = 2048
"""States of one process: what it sends is some megabytes."""


class ChildDied(RuntimeError):
    """A process of a search ended before it told what it had found."""


def split(bounds: Bounds, processes: int, tokens: Tokens | None = None, few: int = _FEW) -> Expand:
    """Expands packed worlds in up to `processes` children at once. Each is forked, so that it has the keys that are
    known at that moment and nothing has to be sent to it. `tokens`, a semaphore, is held by what computes, so that
    several searches together compute on as many cores as are theirs. `few` states are not worth a process."""
    core, fork = begin(bounds), get_context("fork")
    tokens = tokens or nullcontext()

    def expanding(known: Container[bytes], level: deque[tuple[bytes, int]]) -> Iterator[Expanded]:
        size = min(_MANY, max(few, len(level) // (2 * processes)))
        if len(level) <= few:
            with tokens:
                mine = _expanded(core, bounds, known, list(level))
            level.clear()
            yield from mine
            return
        running: deque[tuple[Any, Connection]] = deque()
        try:
            while level or running:
                while level and len(running) < processes:
                    part = [level.popleft() for _ in range(min(size, len(level)))]
                    receiver, sender = fork.Pipe(duplex=False)
                    child = fork.Process(target=_tell, args=(core, bounds, known, part, tokens, sender))
                    child.start()
                    sender.close()
                    running.append((child, receiver))
                yield from _told(*running.popleft())
        finally:
            for rest in running:  # nobody asks for more: there is a finding. One that was killed would keep its token
                _ = _told(*rest)

    return expanding


def _told(child: Any, receiver: Connection) -> list[Expanded]:
    """What a child sends. Raises `ChildDied`."""
    with receiver:
        try:
            answer: list[Expanded] = receiver.recv()
        except EOFError as gone:
            child.join()
            raise ChildDied(f"a process of the search ended with {child.exitcode}; fewer need less memory") from gone
    child.join()
    return answer


def _tell(
    core: Core,
    bounds: Bounds,
    known: Container[bytes],
    part: list[tuple[bytes, int]],
    tokens: Tokens,
    sender: Connection,
) -> None:
    gc.freeze()  # a collection would write to every page that the parent has, and so copy it
    with tokens:
        answer = _expanded(core, bounds, known, part)
    sender.send(answer)


def _expanded(core: Core, bounds: Bounds, known: Container[bytes], part: list[tuple[bytes, int]]) -> list[Expanded]:
    """Of packed worlds. Each state that is new is among them once, where it was come to first."""
    told, seen = list[Expanded](), set[bytes]()

    def is_new(key: bytes) -> bool:
        if key in seen or key in known:
            return False
        seen.add(key)
        return True

    for data, verbs in part:
        one = expand(core, bounds, is_new, unpacked(data), verbs)
        moves = [
            move if move.found is None else move._replace(found=move.found._replace(world=packed(move.found.world)))
            for move in one.moves
        ]
        told.append(one._replace(moves=moves))
        if one.broken is not None:
            break
    return told
