"""Ranks as threads of one process: what leads and what follows, without processes to start."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.ranks.follower import Follower
from agentspeed_engine.exec.ranks.group import GroupBroken
from agentspeed_engine.exec.ranks.leader import LeadingExecutor
from agentspeed_engine.exec.ranks.orders import Channel
from agentspeed_engine.exec.ranks.sides import Followers, Home
from agentspeed_engine.exec.vocabulary import Vocabulary


class Meeting:
    """What the threads share."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self.told: list[Any] = [None] * ranks


class ThreadGroup:
    """`exec.ranks.group.Group` of one thread."""

    comm: Any = None
    recordable = False

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def gather(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        try:
            self._meeting.told[self._rank] = mine
            _ = self._meeting.barrier.wait(60)
            every = np.stack(self._meeting.told)
            _ = self._meeting.barrier.wait(60)
        except threading.BrokenBarrierError as error:
            raise GroupBroken("a thread did not come") from error
        return every

    def abandon(self) -> None:
        self._meeting.barrier.abort()

    def close(self) -> None:
        pass


class NoLosses:
    """Threads do not get lost."""

    def fault(self, error: Exception) -> EngineFault | None:
        return None


@contextmanager
def leading(models: Sequence[Any], vocabulary: Vocabulary, *, depth: int = 0) -> Iterator[LeadingExecutor]:
    """`models[rank]` gives the logits of a rank's ids."""
    meeting, threads = Meeting(len(models)), []
    steps, copies = [], []
    for rank, model in enumerate(models[1:], 1):
        (ours, theirs), (our_copies, their_copies) = socket.socketpair(), socket.socketpair()
        steps.append(ours)
        copies.append(our_copies)

        def follow(model: Any = model, rank: int = rank, ends: Any = (theirs, their_copies)) -> None:
            with ends[0], ends[1]:
                Follower(model, ThreadGroup(meeting, rank), Channel(ends[0]), Channel(ends[1])).run()

        threads.append(threading.Thread(target=follow))
        threads[-1].start()
    followers = Followers(steps, copies, seconds=60.0)
    try:
        side = Home(models[0], ThreadGroup(meeting, 0), followers)
        yield LeadingExecutor(side, vocabulary, NoLosses(), depth=depth)
    finally:
        followers.close()
        for thread in threads:  # those that have just met leave by themselves
            thread.join(1)
        meeting.barrier.abort()
        for thread in threads:
            thread.join(60)
