"""The token log of a branch: what forks share is held once, however often one went back before."""

from __future__ import annotations

import random

import pytest

from agentspeed_engine.kv.token_log import _MAX_DEPTH, Log, Part, _depth


def rewound(log: Log, times: int) -> Log:
    """Each time a little is appended, and less than that is kept."""
    for _ in range(times):
        log.append([2, 2])
        log.cut(len(log) - 1)
    return log


def of(length: int) -> Log:
    log = Log()
    log.append([1] * length)
    return log


def ids_held(*logs: Log) -> int:
    """Ids in all parts that some log reaches, each part once."""
    parts: dict[int, Part] = {}
    for log in logs:
        part: Part | None = log._part
        while part is not None:
            parts[id(part)] = part
            part = part.base
    return sum(len(part.ids) for part in parts.values())


@pytest.mark.parametrize("times", range(3 * _MAX_DEPTH))
def test_forks_share_the_ids_however_often_the_log_went_back(times: int) -> None:
    log = rewound(of(1000), times)
    children = [log.fork() for _ in range(50)]
    assert ids_held(log, *children) <= 2 * (len(log) + times)
    assert all(child.ids(0, len(child)) == log.ids(0, len(log)) for child in children)


def test_children_of_a_deep_log_that_go_on_and_fork_still_share_its_ids() -> None:
    log = rewound(of(1000), _MAX_DEPTH - 1)
    children = [log.fork() for _ in range(20)]
    for number, child in enumerate(children):
        child.append([number])
    grandchildren = [child.fork() for child in children]
    assert ids_held(log, *children, *grandchildren) <= 3 * len(log)
    assert [other.ids(len(log), len(other))[0] for other in grandchildren] == list(range(20))


def test_a_long_line_of_forks_copies_its_ids_once_in_many_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    flattened: list[Part] = []
    flatten = Part.flatten

    def counted(part: Part) -> None:
        flattened.append(part)
        flatten(part)

    monkeypatch.setattr(Part, "flatten", counted)
    log = of(1000)
    for _ in range(10 * _MAX_DEPTH):
        log = log.fork()  # as when a trunk adopts a child that went on
        log.append([3])
        assert _depth(log._part) <= _MAX_DEPTH
    assert log.ids(0, len(log)).tolist() == [1] * 1000 + [3] * 10 * _MAX_DEPTH
    assert 0 < len(flattened) <= 11


def test_going_back_to_the_same_place_again_and_again_makes_no_log_deeper() -> None:
    log = of(10).fork()
    for _ in range(5 * _MAX_DEPTH):
        log.append([4, 5])
        log.cut(10)
    assert _depth(log._part) == 1


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_done_to_some_logs_each_has_its_own_ids(seed: int) -> None:
    chance = random.Random(seed)
    logs: list[tuple[Log, list[int]]] = [(Log(), [])]
    for token in range(600):
        log, ids = chance.choice(logs)
        match chance.randrange(3):
            case 0:
                new = [token] * chance.randrange(3)
                log.append(new)
                ids += new
            case 1:
                length = max(0, len(ids) - chance.randrange(4))
                log.cut(length)
                del ids[length:]
            case _:
                logs.append((log.fork(), list(ids)))
                del logs[: len(logs) - 12]
    for log, ids in logs:
        start = chance.randrange(len(ids) + 1)
        assert log.ids(0, len(log)).tolist() == ids
        assert log.ids(start, len(log)).tolist() == ids[start:]
        assert _depth(log._part) <= _MAX_DEPTH
