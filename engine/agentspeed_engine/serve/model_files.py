"""The files of a model that a client needs for text, served in parts: a client elsewhere has no folder of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, final

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.protocol.messages import (
    TEXT_FILES,
    FilePart,
    GetModelFiles,
    ModelFile,
    ModelFiles,
    ReadModelFile,
)

PART_BYTES: Final = 1 << 20


@final
class ServedFiles:
    """Those of `TEXT_FILES` that the folder has, with their digests as they are now. No other file can be read."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: None for an engine without a model. A file that cannot be read is not served."""
        self._folder = folder
        self._files: dict[str, ModelFile] = {}
        for name in () if folder is None else TEXT_FILES:
            try:
                data = (folder / name).read_bytes() if folder is not None else b""
            except OSError:  # not every model has all of them; what a client cannot do without, it asks for by name
                continue
            self._files[name] = ModelFile(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def listed(self, command: GetModelFiles) -> ModelFiles:
        return ModelFiles(request=command.request, files=tuple(self._files.values()))

    def part(self, command: ReadModelFile) -> FilePart:
        """Raises `EngineFault` (invalid_request) for another name, a bad offset, or a file that is gone."""
        if self._folder is None or command.name not in self._files:
            raise EngineFault(
                "invalid_request",
                f"The engine serves no file {command.name!r}.",
                f"It serves: {', '.join(self._files) or 'none'}.",
            )
        if not 0 <= command.offset <= self._files[command.name].bytes:
            raise EngineFault(
                "invalid_request",
                f"offset is {command.offset}; {command.name} has {self._files[command.name].bytes} bytes.",
            )
        try:
            with open(self._folder / command.name, "rb") as file:
                _ = file.seek(command.offset)
                return FilePart(request=command.request, data=file.read(PART_BYTES))
        except OSError as error:
            raise EngineFault(
                "invalid_request",
                f"{command.name} cannot be read any more: {error}.",
                "Start the engine anew, with the model where it is now.",
            ) from error
