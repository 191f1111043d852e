"""Worlds as bytes: a search that is split over processes sends what it found from one to another."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from enum import Enum
from typing import Any

import msgspec

from agentspeed_engine.sched.pause_model import PauseModel
from agentspeed_engine.sched.state import SchedulerState


def packed(world: SchedulerState) -> bytes:
    """The owners of pages refuse to be pickled, so that none is there twice. Here the table is asked before they are:
    the world that was packed is not gone on with."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(world)
    return file.getvalue()


def unpacked(data: bytes) -> SchedulerState:
    """The world, as often as it is asked for; each shares nothing with the others."""
    world: SchedulerState = pickle.loads(data)
    return world


class _Reducers(dict[type[Any], Callable[[Any], Any]]):
    """How objects of a class are reduced. Found out once a class; those reduced as usual have no entry."""

    def __missing__(self, kind: type[Any]) -> Callable[[Any], Any]:
        ours = kind.__module__.startswith("agentspeed_engine.")
        if not ours or issubclass(kind, tuple | Enum | msgspec.Struct) or "__setstate__" in kind.__dict__:
            raise KeyError(kind)
        slots = [name for one in kind.__mro__ for name in one.__dict__.get("__slots__", ()) if name != "__weakref__"]

        def reduced(value: Any) -> Any:
            state = (None, {name: getattr(value, name) for name in slots}) if slots else value.__dict__
            return copyreg.__newobj__, (kind,), state  # type: ignore[attr-defined]

        self[kind] = reduced
        return reduced


def _law(law: PauseModel) -> Any:
    """Without the sums, which are most of a packed world."""
    return PauseModel.restored, (law.snapshot(),)


_REDUCERS = _Reducers({PauseModel: _law})
