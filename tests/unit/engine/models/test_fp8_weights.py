"""Weights in fp8: the bytes of a checkpoint that has them, the nearest ones of another, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.serve.options import build, options_from
from agentspeed_kernels.fp8_blocks import BLOCK, Fp8Rows, in_blocks, joined
from tests.support.decoded_logits import apart, decoded_logits
from tests.support.fp8_checkpoint import make_fp8_checkpoint
from tests.support.paged import CONFIG

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 64
IDS = np.random.default_rng(5).integers(0, 300, 40).tolist()
LATENT = CONFIG | {
    "hidden_size": 320, "intermediate_size": 200, "moe_intermediate_size": 136, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "num_hidden_layers": 2,
}  # fmt: skip
"""Joins and heads fit blocks, as in what is published; blocks of the other widths are cut."""
TORN = CONFIG | {"hidden_size": 144, "num_hidden_layers": 2}
"""Queries of low rank and latents share a block once they are joined."""
SPARSE = LATENT | {
    "model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 2, "index_topk": 16,
}  # fmt: skip
GROUPED: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 320, "hidden_size": 200, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rope_theta": 5000.0, "attention_bias": False, "tie_word_embeddings": True,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


def logits(model: LoadedModel) -> torch.Tensor:
    return decoded_logits(model, IDS, 32, PAGE)


@pytest.mark.parametrize("config", [LATENT, SPARSE, GROUPED], ids=["latent", "sparse", "grouped"])
def test_a_checkpoint_in_fp8_keeps_its_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    folder = make_fp8_checkpoint(config, tmp_path, seed=3)
    wide = load(folder, dtype="float64", pages=6, page_tokens=PAGE)
    held = load(folder, dtype="float64", pages=6, page_tokens=PAGE, weights="fp8")
    assert apart(logits(held), logits(wide)) < 1e-7  # scales times bytes are rounded to float32 when taken back at load


def test_rows_that_a_join_brings_into_one_block_are_quantised_again(tmp_path: Path) -> None:
    folder = make_fp8_checkpoint(TORN, tmp_path, seed=3)
    wide = logits(load(folder, dtype="float64", pages=6, page_tokens=PAGE))
    assert apart(logits(load(folder, dtype="float64", pages=6, page_tokens=PAGE, weights="fp8")), wide) < 0.04


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_what_the_bytes_stand_for(dtype: Any, tmp_path: Path) -> None:
    folder = make_fp8_checkpoint(LATENT, tmp_path, seed=3)
    exact = logits(load(folder, dtype="float64", pages=6, page_tokens=PAGE, weights="fp8"))
    wide = apart(logits(load(folder, dtype=dtype, pages=6, page_tokens=PAGE)), exact)
    held = apart(logits(load(folder, dtype=dtype, pages=6, page_tokens=PAGE, weights="fp8")), exact)
    assert held < 1.1 * wide + 1e-6


@pytest.mark.parametrize("config", [LATENT, TORN, GROUPED], ids=["latent", "torn", "grouped"])
@pytest.mark.parametrize("weights", ["int8", "int8-32"])
def test_int8_is_made_of_what_a_checkpoint_in_fp8_stands_for(
    config: dict[str, Any], weights: Any, tmp_path: Path
) -> None:
    folder = make_fp8_checkpoint(config, tmp_path, seed=3)
    wide = logits(load(folder, dtype="float64", pages=6, page_tokens=PAGE))
    assert apart(logits(load(folder, dtype="float32", pages=6, page_tokens=PAGE, weights=weights)), wide) < 0.02


def test_blocks_that_are_not_numbers_are_found_far_down_a_matrix() -> None:
    odd = torch.ones(700, 300)
    odd[650, 140] = float("nan")
    wide = Fp8Rows.of(odd.to(torch.float8_e4m3fn), torch.full((6, 3), 2.0)).wide(torch.bfloat16)
    assert not bool(wide[650, 128:256].isfinite().any())
    assert bool((wide[torch.arange(700) != 650] == 2).all())


def test_a_piece_of_whole_blocks_has_their_bytes_and_scales() -> None:
    weight = torch.randn(300, 257, generator=torch.Generator().manual_seed(1))
    blocks = in_blocks(weight)
    rows = Fp8Rows.of(blocks.data, blocks.scales)
    again = in_blocks(joined([rows[torch.arange(0, 256)], rows[torch.arange(256, 300)]]))
    for got in (again, blocks.outputs(0, 300)):
        assert torch.equal(got.data.view(torch.uint8), blocks.data.view(torch.uint8))
        assert torch.equal(got.scales, blocks.scales)
    part = blocks.outputs(BLOCK, 290)
    assert torch.equal(part.whole(torch.float64), blocks.whole(torch.float64)[BLOCK:290])


def test_the_nearest_bytes_are_within_half_a_step() -> None:
    weight = torch.randn(300, 257, generator=torch.Generator().manual_seed(1))
    blocks = in_blocks(weight)
    off = (blocks.whole(torch.float64) - weight).abs()
    least = 2.0**-10 * blocks.scales.double().amax()  # half of the smallest number of e4m3
    assert bool((off <= (weight.double().abs() / 16).clamp(min=least) * 1.001).all())


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_makes_its_block_none_and_no_other(odd: float) -> None:
    weight = torch.ones(200, 300)
    weight[3, 129] = odd
    blocks = in_blocks(weight)
    stored = Fp8Rows.of(torch.where(weight.isfinite(), weight, float("nan")).to(torch.float8_e4m3fn), torch.ones(2, 3))
    for whole in (blocks.whole(torch.float32), in_blocks(stored).whole(torch.float32)):
        assert not bool(whole[:128, 128:256].isfinite().any())
        assert bool((whole[128:] == 1).all()) and bool((whole[:, :128] == 1).all())


def test_ranks_that_would_tear_a_block_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_fp8_checkpoint(LATENT, tmp_path, seed=3)
    with pytest.raises(EngineFault, match="the cut goes through a block"):
        build(options_from({"model": str(folder), "pages": 8, "weights": "fp8", "device": "cpu", "tp": 4}))
