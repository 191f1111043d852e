"""Sparse attention: which layers choose, what a configuration may say of it, and who is chosen among equals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.config import parse
from agentspeed_engine.models.planning import plan_model
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_kernels.cpu.torch_sparse import index_select
from agentspeed_kernels.reference import sparse as define
from agentspeed_kernels.testing.conformance import piece
from agentspeed_kernels.tiles import plan_tiles
from agentspeed_kernels.workspace import Workspace
from tests.conformance.family_configs import SPARSE, random_config
from tests.support.random_checkpoint import make_checkpoint


def glm(**changed: Any) -> dict[str, Any]:
    config = random_config("glm_moe_dsa", 0) | {"num_hidden_layers": 6, "first_k_dense_replace": 1}
    _ = config.pop("indexer_types", None)
    return config | changed


@pytest.mark.parametrize(
    ("said", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"indexer_types": ["full", "shared", "full", "shared", "shared", "full"]}, (0, 2, 5)),
        ({"index_topk_pattern": "FSSFSS"}, (0, 3)),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 2}, (0, 1, 5)),
    ],
)
def test_the_layers_that_choose_are_those_of_the_published_code(said: dict[str, Any], layers: tuple[int, ...]) -> None:
    config: Any = parse(glm(**said))
    assert config.indexer.layers == layers


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"q_lora_rank": None}, "q_lora_rank"),
        ({"indexer_types": ["shared"] * 6}, "begins with a shared layer"),
        ({"indexer_types": ["full"] * 5}, "list of 6"),
        ({"index_topk_pattern": "FXSSSS"}, "index_topk_pattern"),
        ({"index_head_dim": 2}, "index_head_dim 2 is below"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave"),
    ],
)
def test_what_an_indexer_cannot_be_is_refused_by_its_field(said: dict[str, Any], why: str) -> None:
    with pytest.raises(EngineFault) as refusal:
        _ = parse(glm(**said))
    assert why in f"{refusal.value.message} {refusal.value.remedy}"


@pytest.mark.parametrize("model_type", SPARSE)
def test_a_plan_on_several_ranks_is_refused_by_the_name_of_the_family(model_type: str, tmp_path: Any) -> None:
    folder = make_checkpoint(random_config(model_type, 0), tmp_path)
    with pytest.raises(EngineFault, match="sparse multi-head latent attention"):
        _ = plan_model(read_source(folder), Mesh(tp=2), dtype="float32", rows=1)


def test_among_equals_the_earlier_position_is_chosen_wherever_its_page_lies() -> None:
    """Scores that are all zero: a rectified sum is often that."""
    pages, positions = np.array([3, 0, 2, 1], np.int32), np.array([14], np.int64)
    pieces = [
        piece(pages[2:], 8, 7, np.array([0], np.int32), True),
        piece(pages[:2], 0, 8, np.array([0], np.int32), False),
    ]
    tiles = plan_tiles(pieces, positions, page_tokens=4, chunk_tokens=3, block_rows=4)
    q, x, weight, pool = torch.zeros(1, 2, 4), torch.ones(1, 3), torch.ones(2, 3), torch.ones(4, 4, 4)
    chosen = index_select(q, x, weight, pool, tiles, 6, Workspace())
    assert chosen.tolist() == [[12, 13, 14, 15, 0, 1]]
    assert define.index_select(q, x, weight, pool, tiles, 6).tolist() == chosen.tolist()
