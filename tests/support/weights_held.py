"""How many bytes of weights a loaded model holds, looked for in its steps."""

from __future__ import annotations

from agentspeed_engine.models.held_weights import held_by, numbers_of
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_kernels.fp8_blocks import Fp8Blocks
from agentspeed_kernels.quantised import Quantised


def bytes_held(model: LoadedModel) -> int:
    """Of all weights, each once."""
    found: dict[int, int] = {}
    pools = {pool.untyped_storage().data_ptr() for pool in model.pools.tensors}
    cells = (cell.cell_contents for step in model._steps for cell in step.__closure__ or ())
    for weight in (weight for cell in cells for weight in held_by(cell)):
        storage = numbers_of(weight).untyped_storage()
        if storage.data_ptr() not in pools:
            scales = weight.scales.nbytes if isinstance(weight, Quantised | Fp8Blocks) else 0
            found[storage.data_ptr()] = storage.nbytes() + scales
    return sum(found.values())
