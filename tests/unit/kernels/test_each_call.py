"""What watches C calls is told of each, whether it is made or on a tape that is repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.native_kernels import moves
from agentspeed_kernels.cpu.recording import each_call, recording
from agentspeed_kernels.platform import detect
from tests.support.needs import missing


def test_calls_are_told_one_by_one_as_they_are_made_and_as_a_tape_repeats_them() -> None:
    if isinstance(library := native.library(), native.Unavailable):
        missing(f"the native kernels cannot be built here: {library.reason}")
    kernels = moves(detect().features, "float32")
    assert kernels is not None
    x, weight, out = torch.randn(3, 48), torch.randn(48), torch.zeros(3, 48)
    heads = torch.zeros(3, 1, 48)
    told: list[tuple[str, tuple[Any, ...]]] = []

    def watch(op: str, given: tuple[Any, ...], nanoseconds: int) -> None:
        assert nanoseconds >= 0
        told.append((op, given))

    with recording() as tape, each_call(watch):
        kernels.rms_norm(x, weight, 1e-6, out)
        kernels.copy(out.view(3, 1, 48), heads)
    made, expected = list(told), heads.clone()
    assert [op for op, _ in made] == ["rms_norm", "copy"]
    told.clear()
    heads.zero_()
    with each_call(watch):
        tape.run()
    assert told == made
    assert torch.equal(heads, expected)
    told.clear()
    tape.run()
    assert told == []


def test_nobody_is_told_once_a_watch_has_ended_with_an_error() -> None:
    if isinstance(library := native.library(), native.Unavailable):
        missing(f"the native kernels cannot be built here: {library.reason}")
    kernels = moves(detect().features, "float32")
    assert kernels is not None
    told: list[str] = []
    with pytest.raises(KeyError), each_call(lambda op, _given, _taken: told.append(op)):
        raise KeyError
    kernels.add(torch.ones(4), torch.ones(4))
    assert told == []
