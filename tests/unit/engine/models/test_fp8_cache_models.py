"""A KV cache in fp8 as an option of a model: what it takes, what it changes, and where it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import load, read_source
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.models.planning import plan_model
from agentspeed_engine.models.source import describe
from agentspeed_engine.serve.options import build, options_from
from agentspeed_engine.serve.rank_shares import shares_of
from agentspeed_engine.spmd.placement import Mesh
from tests.conformance.family_configs import random_config
from tests.support.decoded_logits import apart, decoded_logits
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint
from tests.support.thread_sums import logits_of, on_two_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 16
IDS = np.random.default_rng(5).integers(0, 300, 90).tolist()
GROUPED: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rope_theta": 5000.0, "attention_bias": False, "tie_word_embeddings": True,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


@pytest.fixture(scope="module", params=[CONFIG, GROUPED], ids=["latent", "grouped"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("model"), seed=8, dtype="bfloat16")


def logits(model: LoadedModel) -> torch.Tensor:
    return decoded_logits(model, IDS, 70, PAGE)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_logits_stay_near_those_of_a_cache_in_the_models_format(folder: Path, dtype: Any) -> None:
    exact = logits(load(folder, dtype="float64", pages=6, page_tokens=PAGE))
    held = apart(logits(load(folder, dtype=dtype, pages=6, page_tokens=PAGE, cache="fp8")), exact)
    assert 1e-4 < held < 0.04


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pools_take_the_bytes_that_are_told_and_less_than_the_models_format(folder: Path, dtype: Any) -> None:
    model = load(folder, dtype=dtype, pages=6, page_tokens=PAGE, cache="fp8")
    assert sum(pool.nbytes for pool in model.pools.tensors) == 6 * model.info.bytes_per_page
    told = describe(folder, dtype=dtype, page_tokens=PAGE, cache="fp8")
    assert told.bytes_per_page == model.info.bytes_per_page
    if dtype == "float32":
        assert told.bytes_per_page < describe(folder, dtype=dtype, page_tokens=PAGE).bytes_per_page


def test_two_ranks_give_what_one_gives(folder: Path) -> None:
    """A scale is of one head and of one token, whatever rank has it."""
    given: dict[str, Any] = {"dtype": "float64", "pages": 6, "page_tokens": PAGE, "cache": "fp8"}
    alone = logits(load(folder, **given))
    both = logits_of(on_two_ranks(folder, **given), logits)
    assert float((both - alone).abs().max()) < 1e-10


def test_ranks_are_sized_by_the_bytes_of_their_own_heads(folder: Path) -> None:
    options = {"model": str(folder), "dtype": "bfloat16", "device": "cpu", "tp": 2, "kv_cache_dtype": "fp8"}
    source = read_source(folder)
    each = source.family.kv_layout(source.config, "fp8", Mesh(tp=2)).bytes_per_page(64)
    told = shares_of(options_from(options), describe(folder, dtype="bfloat16", cache="fp8"))
    assert told.bytes_per_page == 2 * each


def test_the_engine_says_in_what_its_pages_are(folder: Path) -> None:
    said: list[str] = []
    given = {"model": str(folder), "dtype": "float32", "device": "cpu", "kv_cache_dtype": "fp8", "pages": 50}
    built = build(options_from(given), said.append)
    assert any("for 50 pages in fp8" in line for line in said)
    assert built.model.loaded.pools.tensors[0].dtype == torch.uint8  # type: ignore[attr-defined]


def test_a_cache_of_sparse_attention_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(random_config("deepseek_v32", 0)))
    given = {"model": f"random:{tmp_path / 'config.json'}", "device": "cpu", "kv_cache_dtype": "fp8"}
    with pytest.raises(EngineFault, match=r"sparse attention.*Leave kv_cache_dtype out") as refused:
        build(options_from(given))
    assert refused.value.code == "bad_options"


def test_heads_that_are_too_narrow_are_refused_with_their_width(tmp_path: Path) -> None:
    config = make_checkpoint(GROUPED | {"head_dim": 8}, tmp_path)
    with pytest.raises(EngineFault, match=r"W is 16 or more, not 8") as refused:
        load(config, dtype="float32", pages=2, cache="fp8")
    assert refused.value.code == "bad_options"


def test_another_format_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(EngineFault, match=r"kv_cache_dtype is 'int8'.*one of dtype, fp8"):
        options_from({"model": str(folder), "kv_cache_dtype": "int8"})


def test_a_plan_counts_a_cache_in_fp8() -> None:
    """DeepSeek-V3: 61 layers of 512 numbers, a scale with its padding, and 64 turned numbers in bfloat16."""
    source = read_source(f"random:{Path(__file__).parents[4] / 'bench/models/deepseek-v3.json'}")
    plan = plan_model(source, Mesh(tp=16), dtype="bfloat16", rows=8, memory=141 * 10**9, cache="fp8")
    wide = plan_model(source, Mesh(tp=16), dtype="bfloat16", rows=8, memory=141 * 10**9)
    assert (plan.cache_bytes_per_token, plan.cache) == (61 * (512 + 16 + 128), "fp8")
    assert plan.room is not None and wide.room is not None
    assert plan.room.tokens > 1.7 * wide.room.tokens
