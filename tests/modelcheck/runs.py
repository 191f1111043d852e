"""Searches and mutants as processes beside each other, on as many cores as they are given."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import msgspec

from tests.modelcheck.explorer import Bounds, Explored, explore
from tests.modelcheck.mutants import MUTANTS
from tests.modelcheck.packing import packed
from tests.modelcheck.split import split

_SPLIT_FROM = 4
"""Cores. On fewer, whole searches beside each other are faster: a state that is sent is packed and unpacked."""
_TOKENS: list[AbstractContextManager[Any]] = []
"""Of this process, from the one that started it."""


@dataclass(frozen=True, slots=True)
class Job:
    """A search within bounds, or for a mutant, by its place."""

    name: str
    bounds: Bounds | None = None
    mutant: int | None = None


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """What a job came to."""

    name: str
    states: int
    transitions: int
    complete: bool
    reached: list[str]
    rule: str = ""
    """The rule that does not hold; empty: all hold."""
    steps: int = 0
    finding: str = ""
    seconds: float


def run(jobs: Sequence[Job], cores: int, at_once: int | None = None) -> Iterator[Ended]:
    """Carries out jobs, the first ones first, and tells each when it has ended. `at_once` searches keep their states in
    memory at the same time; when left out, as many as keep the cores busy."""
    tokens = get_context("fork").BoundedSemaphore(cores)
    at_once = at_once or (cores if cores < _SPLIT_FROM else 2 + cores // 4)
    with ProcessPoolExecutor(
        at_once, mp_context=get_context("fork"), initializer=_TOKENS.append, initargs=(tokens,)
    ) as pool:
        for future in as_completed([pool.submit(_carried_out, job, cores) for job in jobs]):
            yield future.result()


def _carried_out(job: Job, cores: int) -> Ended:
    started = time.monotonic()
    if job.mutant is not None:
        with _TOKENS[0], MUTANTS[job.mutant].applied():
            found = explore(MUTANTS[job.mutant].bounds)
    elif job.bounds is None:
        raise ValueError(f"{job.name} is neither a search nor a mutant")
    elif cores < _SPLIT_FROM:
        found = explore(job.bounds, _Progress(job.name))
    else:
        expanding = split(job.bounds, cores, _TOKENS[0])
        found = explore(job.bounds, _Progress(job.name), expanding, packed)
    return _ended(job.name, found, time.monotonic() - started)


def _ended(name: str, found: Explored, seconds: float) -> Ended:
    finding = found.finding
    return Ended(
        name=name,
        states=found.states,
        transitions=found.transitions,
        complete=found.complete,
        reached=sorted(found.reached),
        rule=finding.rule if finding else "",
        steps=len(finding.trace) if finding else 0,
        finding=str(finding) if finding else "",
        seconds=round(seconds, 1),
    )


class _Progress:
    """Says how far a search is once a minute."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = self._said = time.monotonic()

    def __call__(self, states: int, waiting: int) -> None:
        now = time.monotonic()
        if now - self._said >= 60:
            self._said = now
            rate = states / (now - self._started)
            print(
                f"  ... {states} states, {waiting} of them to be explored, {rate:.0f} a second: {self._name}",
                flush=True,
            )
