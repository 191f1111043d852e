"""What the CPU executor needs of a model: logits of a step, and the moves of pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from agentspeed_engine.models.inputs import FlatBatch


class Model(Protocol):
    """`exec.torch_model.TorchModel` and `exec.noop.NoopModel` are ones.

    `save` and `load` are called from another thread than the rest: they touch only pages that no step writes."""

    page_tokens: int

    def logits(self, batch: FlatBatch) -> NDArray[Any]:
        """[S, vocab] of `batch.select`, float32 or float64. Returns when the step is through: its rows are in the pool
        and it reads no page any more, for then its pages may be copied, or have another owner."""
        ...

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        """The first `rows` rows of a page, in every layer."""
        ...

    def reserve_host(self, slots: int) -> None:
        """Host memory for `slots` pages, once. Raises `EngineFault` (out_of_memory)."""
        ...

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Device pages to host slots. Raises `CopyFailed`."""
        ...

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Host slots to device pages. Raises `CopyFailed`."""
        ...
