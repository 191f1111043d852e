"""Whether a mesh divides a model, and the blocks that its weights are stored in."""

from __future__ import annotations

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.mesh import check_cuts
from agentspeed_engine.models.pieces import part_of
from agentspeed_engine.models.quantization import FP8_BLOCK, declared_scheme, torn_block
from agentspeed_engine.models.source import ModelSource
from agentspeed_engine.spmd.placement import Mesh


def check_mesh(source: ModelSource, mesh: Mesh) -> None:
    """Every cut must be even, and go between the blocks of a checkpoint that is stored in fp8 by its configuration;
    its files are not opened. Raises `EngineFault` (bad_config)."""
    check_cuts(source.family.cuts(source.config, mesh))
    if not _in_blocks(source):
        return
    for name, shape in source.family.shapes(source.config):
        if not name.endswith("_proj.weight") or (".experts." in name and ".experts.0." not in name):
            continue  # one expert is like another
        part = part_of(name, mesh.rank(0))
        if part is not None and part.count > 1 and shape[part.dim] // part.count % FP8_BLOCK:
            raise torn_block(name, shape[part.dim], part.count)


def _in_blocks(source: ModelSource) -> bool:
    try:
        return declared_scheme(source.raw) == "fp8_blocks"
    except EngineFault:  # a scheme that does not run, of a model whose weights nobody reads here
        return False
