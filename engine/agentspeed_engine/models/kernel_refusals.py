"""What cannot be chosen among kernels, as a refusal that says what may be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentspeed_engine.errors import EngineFault
from agentspeed_kernels.platform import NoDevice, UnknownPlatform
from agentspeed_kernels.selection import SWITCH, NoKernel, WrongPreference


@contextmanager
def kernels_chosen(*, batch_invariant: bool = False) -> Iterator[None]:
    """Around the choice of a platform and its kernels. Raises `EngineFault` (bad_options) where there is none.
    `batch_invariant`: whether only such kernels were to be chosen."""
    try:
        yield
    except WrongPreference as error:
        raise EngineFault("bad_options", f"The variable {SWITCH} is wrong: {error.message}", error.remedy) from error
    except (NoDevice, UnknownPlatform, NoKernel) as error:
        remedy = f"Name another platform, dtype or format of weights or cache, or exclude fewer kernels in {SWITCH}."
        if batch_invariant:
            remedy = f"Leave batch_invariant out. {remedy}"
        raise EngineFault("bad_options", str(error), remedy) from error
