"""An engine as an object: one model served by one process, opened and closed by who made it."""

from __future__ import annotations

from typing import Unpack, final

from agentspeed._core.engine_handle import EngineHandle
from agentspeed._core.model_files import NANO as NANO
from agentspeed.session import Session, SessionOptions


@final
class Engine(EngineHandle):
    """`async with Engine("model", pages=4096) as engine: async with engine.session() as s: ...`

    `model` is a Hugging Face model folder or a repository id; None is the model that ships with the package. The
    options are those of `EngineOptions`; an unknown one is refused at once, a value that cannot be when the process
    starts. `on_start` is told how far each start is, in the thread that waits for it:

        Engine("model", on_start=lambda how: print(how.text, how.part))"""

    def session(self, **options: Unpack[SessionOptions]) -> Session:
        """A session on this engine; the options are those of `Session`."""
        return Session(self, **options)
