"""A loaded model behind the worker's protocol, with the host slots its pages can be saved to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.run.model import CopyFailed


@final
class TorchModel:
    """On CPU host slots are a second arena: they prove that copies are right, not that they are worth it."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._slots: torch.Tensor | None = None
        self.page_tokens = model.page_tokens

    def logits(self, batch: FlatBatch) -> NDArray[Any]:
        logits = self._model.forward(batch)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        return np.asarray(logits.cpu().numpy())

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        self._model.copy_rows(src_page, dst_page, rows)

    def reserve_host(self, slots: int) -> None:
        page = self._model.read_pages([0])
        try:
            # Pinned where there is a device to copy from; rows are page first, so a slot is one contiguous piece.
            self._slots = torch.empty((slots, *page.shape[1:]), dtype=page.dtype, pin_memory=page.is_cuda)
        except RuntimeError as error:
            raise EngineFault("out_of_memory", f"No host memory for {slots} slots: {error}.",
                              "Give fewer host slots.") from error

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        arena = self._arena()
        try:
            arena[torch.as_tensor(slots, dtype=torch.int64)] = self._model.read_pages(pages).cpu()
        except RuntimeError as error:
            raise CopyFailed(str(error)) from error

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        arena = self._arena()
        try:
            self._model.write_pages(pages, arena[torch.as_tensor(slots, dtype=torch.int64)])
        except RuntimeError as error:
            raise CopyFailed(str(error)) from error

    def _arena(self) -> torch.Tensor:
        if self._slots is None:
            raise CopyFailed("the engine has no host slots")
        return self._slots
