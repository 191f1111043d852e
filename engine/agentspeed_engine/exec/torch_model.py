"""A loaded model behind the executor's protocol, with the host slots its pages can be saved to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from agentspeed_engine.exec.arena import HostArena
from agentspeed_engine.exec.executor import CopyFailed
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.loaded import LoadedModel


@final
class TorchModel:
    def __init__(self, model: LoadedModel) -> None:
        self.loaded = model
        self._host: HostArena | None = None
        self.page_tokens = model.page_tokens
        self.first_id = model.first_id

    def logits(self, batch: FlatBatch) -> NDArray[Any]:
        logits = self.loaded.forward(batch)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        return np.asarray(logits.cpu().numpy())

    def run(self, batch: FlatBatch) -> None:
        """One pass whose logits nobody wants; it is through when this returns."""
        _ = self.logits(batch)

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        self.loaded.copy_rows(src_page, dst_page, rows)

    def reserve_host(self, slots: int) -> None:
        self._host = HostArena(self.loaded.pools.tensors, slots)

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._arena().save(pages, slots)

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._arena().load(slots, pages)

    def _arena(self) -> HostArena:
        if self._host is None:
            raise CopyFailed("the engine has no host slots")
        return self._host
