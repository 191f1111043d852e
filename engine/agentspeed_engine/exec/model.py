"""What the CPU executor needs of a model: logits of a step, and the moves of pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from agentspeed_engine.models.inputs import FlatBatch


class Model(Protocol):
    """`exec.torch_model.TorchModel` and `exec.noop.NoopModel` are ones.

    The executor's thread calls `logits` and `copy_rows`, one call after the other. The copier's thread calls `save` and
    `load` at the same time: they touch only pages that no step writes. `reserve_host` is called once, before both."""

    page_tokens: int

    def logits(self, batch: FlatBatch) -> NDArray[Any]:
        """[S, vocab] of `batch.select`, float32 or float64. Returns when the step is through: its rows are in the pool
        and it reads no page any more, for then its pages may be copied, or have another owner."""
        ...

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        """Copies the first `rows` rows of a page onto another, in every layer, before the next `logits`."""
        ...

    def reserve_host(self, slots: int) -> None:
        """Host memory for `slots` pages, once. Raises `EngineFault` (out_of_memory)."""
        ...

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copies device pages to host slots, one each, and returns when the rows have arrived. Raises `CopyFailed`."""
        ...

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Copies host slots to device pages, one each, and returns when the rows have arrived. Raises `CopyFailed`."""
        ...
