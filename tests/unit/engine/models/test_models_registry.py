"""Which model types run, what is said of others, what a family keeps of a token, and where weights come from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models import family as families
from agentspeed_engine.models.catalog import describe, load, read_source
from agentspeed_engine.models.config import parse
from agentspeed_engine.models.kv_layout import KvLayout, KvPool
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.other_types import KNOWN
from agentspeed_engine.models.registry import FAMILIES, supported_types
from agentspeed_engine.models.weights import MetaWeights
from agentspeed_engine.spmd.placement import ONE, Mesh
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from tests.conformance.family_configs import random_config
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint


def refusal(raw: dict[str, Any]) -> EngineFault:
    with pytest.raises(EngineFault) as caught:
        parse(raw)
    return caught.value


@pytest.mark.parametrize("model_type", KNOWN)
def test_a_known_type_that_does_not_run_is_refused_with_what_is_missing_and_what_is_near(model_type: str) -> None:
    fault = refusal({"model_type": model_type, "hidden_size": 64})
    assert fault.code == "unsupported_model"
    what, nearest = KNOWN[model_type]
    assert what in fault.message
    assert not nearest or f"The nearest family that runs is {nearest}." in fault.remedy
    assert all(name in fault.remedy for name in supported_types())


def test_what_is_near_runs_and_what_is_refused_does_not() -> None:
    assert {nearest for _, nearest in KNOWN.values() if nearest} <= set(supported_types())
    assert not set(KNOWN) & set(supported_types())


UNLISTED: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "new", "kv_lora_rank": 8}, "multi-head latent attention", "deepseek_v3"),
    ({"model_type": "new", "num_key_value_heads": 2}, "grouped-query attention", "llama"),
    ({"model_type": "new", "num_key_value_heads": 2, "num_experts": 4}, "grouped-query attention", "qwen3_moe"),
    ({"model_type": "new", "is_encoder_decoder": True}, "an encoder with a decoder", ""),
    ({"model_type": "new", "num_key_value_heads": 2, "sliding_window": 64}, "sliding-window attention", "llama"),
    (
        {"model_type": "new", "kv_lora_rank": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "sliding-window attention",
        "deepseek_v3",
    ),
    ({"model_type": "new", "num_key_value_heads": 2, "mamba_d_state": 16}, "recurrent state", "llama"),
    ({"model_type": "new", "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "recurrent", "llama"),
    (
        {"model_type": "new", "num_key_value_heads": 2, "layer_types": ["chunked_attention"]},
        "attention in chunks",
        "llama",
    ),
    (
        {"model_type": "new", "num_key_value_heads": 2, "sliding_window": 64, "use_sliding_window": False},
        "it has grouped-query attention, but",
        "llama",
    ),
    (
        {"model_type": "new", "num_key_value_heads": 2, "vision_config": {}},
        "it reads more than text, which is not implemented",
        "llama",
    ),
    ({"model_type": "new", "text_config": {"model_type": "llama"}}, "it holds a language model ('llama')", "llama"),
    (
        {"model_type": "new", "text_config": {"model_type": "qwen3_next"}},
        "it holds a language model ('qwen3_next') among others, which is not implemented, and a Qwen3-Next",
        "qwen3_moe",
    ),
    (
        {"model_type": "new", "language_config": {"num_key_value_heads": 2, "num_experts": 4}},
        "it holds a language model among others, which is not implemented",
        "qwen3_moe",
    ),
    ({"model_type": "new"}, "nobody implemented", ""),
    ({"model_type": ["llama"]}, "does not say which architecture", ""),
    ({}, "does not say which architecture", ""),
]


@pytest.mark.parametrize(("raw", "words", "near"), UNLISTED, ids=[str(case[0]) for case in UNLISTED])
def test_a_type_that_nobody_listed_is_told_by_its_fields(raw: dict[str, Any], words: str, near: str) -> None:
    fault = refusal(raw)
    assert fault.code == "unsupported_model" and words in fault.message
    assert (f"nearest family that runs is {near}." in fault.remedy) == bool(near)


def test_a_family_that_cannot_go_back_to_any_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from agentspeed_engine.models import registry

    recurrent: families.Family[Any] = replace(FAMILIES[0], name="Recurrent", capabilities=frozenset())
    monkeypatch.setitem(registry.BY_TYPE, "deepseek_v2", recurrent)
    fault = refusal(random_config("deepseek_v2", 0))
    assert fault.code == "unsupported_model" and "rewind_to_any_token" in fault.message


def test_describing_any_family_loads_no_tensors(tmp_path: Path) -> None:
    for model_type in supported_types():
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(random_config(model_type, 1)))
    code = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r};"
        "from agentspeed_engine.models.catalog import describe; from pathlib import Path;"
        f"[describe(folder) for folder in Path({str(tmp_path)!r}).iterdir()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("model_type", supported_types())
def test_a_cache_takes_the_bytes_its_layout_says(model_type: str, tmp_path: Path) -> None:
    config = random_config(model_type, 2)
    folder = make_checkpoint(config, tmp_path)
    info = describe(folder, dtype="bfloat16", page_tokens=8)
    pools = load(folder, dtype="bfloat16", pages=5, page_tokens=8).pools
    assert sum(pool.nbytes for pool in pools.tensors) == 5 * info.bytes_per_page
    assert info.bytes_per_page == 8 * info.kv.bytes_per_token
    held = load_file(folder / "model.safetensors")
    assert info.parameters == sum(tensor.numel() for tensor in held.values())


def test_published_models_keep_so_many_bytes_of_a_token() -> None:
    """DeepSeek-V3 in bfloat16: 61 layers of 512 + 64; Llama 3.1 8B: 32 layers of 8 heads of 128, twice."""
    v3 = CONFIG | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    llama = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    for raw, wanted in ((v3, 70_272), (llama, 131_072)):
        family = next(found for found in FAMILIES if raw["model_type"] in found.model_types)
        assert family.kv_layout(parse(raw), "bfloat16", Mesh()).bytes_per_token == wanted
        if raw is llama:
            assert family.kv_layout(parse(raw), "bfloat16", Mesh(tp=4)).bytes_per_token == wanted // 4


def test_in_fp8_they_keep_a_byte_of_each_number_a_scale_of_each_head_and_turned_coordinates_as_they_are() -> None:
    """Of DeepSeek-V3's latents 512 + 16 + 2 * 64 bytes; of 8 heads of 128, and of 2 on each of four ranks, and 16."""
    latent = KvPool(name="latent", layers=61, width=576, dtype="fp8", plain=64)
    keys = KvPool(name="keys", layers=32, width=1024, dtype="fp8", heads=8)
    part = KvPool(name="keys", layers=32, width=256, dtype="fp8", heads=2)
    assert latent.bytes_per_token == 61 * 656
    assert (keys.bytes_per_token, part.bytes_per_token) == (32 * (1024 + 32), 32 * (256 + 16))
    for pool in (latent, keys, part):
        (held,) = KvPools(KvLayout(pools=(pool,)), pages=2, page_tokens=4).tensors
        assert held.dtype == torch.uint8 and held.nbytes == 8 * pool.bytes_per_token


def test_rows_are_cleared_in_every_layer_of_every_pool_and_no_others() -> None:
    layout = KvLayout(
        pools=(
            KvPool(name="a", layers=2, width=3, dtype="float32"),
            KvPool(name="b", layers=1, width=8, dtype="fp8", heads=2),
        )
    )
    pools = KvPools(layout, pages=3, page_tokens=4)
    for pool in pools.tensors:
        pool.fill_(float("nan") if pool.dtype.is_floating_point else 255)
    pools.clear(torch.tensor([4 + 2, 4 + 3, 8]))
    for pool in pools.tensors:
        wanted = torch.zeros(3, 4, dtype=torch.bool)
        wanted[1, 2:] = wanted[2, 0] = True
        assert torch.equal((pool == 0).all(-1), wanted.expand(pool.shape[0], -1, -1))


def test_rows_are_copied_in_every_layer_of_every_pool() -> None:
    layout = KvLayout(
        pools=(
            KvPool(name="a", layers=2, width=3, dtype="float32"),
            KvPool(name="b", layers=1, width=5, dtype="bfloat16"),
        )
    )
    pools = KvPools(layout, pages=3, page_tokens=4)
    for number, pool in enumerate(pools.tensors):
        pool[:, 1] = number + 1
    pools.copy_rows(1, 2, 3)
    for number, pool in enumerate(pools.tensors):
        assert (pool[:, 2, :3] == number + 1).all() and (pool[:, 2, 3:] == 0).all() and (pool[:, 0] == 0).all()


@pytest.mark.parametrize("model_type", supported_types())
def test_a_chain_is_built_of_shapes_alone(model_type: str) -> None:
    """What planning does with models far larger than the machine."""
    raw = random_config(model_type, 3)
    family = next(found for found in FAMILIES if model_type in found.model_types)
    config = parse(raw)
    weights = MetaWeights(dict(family.shapes(config)), torch.float32)
    kernels = Kernels(standard(), detect(), "float32", tuple(OPS))
    pools = KvPools(family.kv_layout(config, "float32", ONE.mesh), 1, 8)
    chain = family.build(config, weights, pools, ONE, kernels)
    assert [module.boundary.name for module in chain][-1] == "head"


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "kimi_k25"])
def test_random_weights_need_a_configuration_only_and_are_the_same_every_time(model_type: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(random_config(model_type, 4)))
    step = [(Trail(8, [0, 1]), [1, 2, 3])]
    first, again = (
        load(f"random:{place}", dtype="float64", pages=4, page_tokens=8).forward(batch(8, step))
        for place in (path, tmp_path)
    )
    step[0][0].known = 0
    assert bool(torch.isfinite(first).all()) and 0.05 < float(first.std()) < 20
    third = load(f"random:{path}", dtype="float64", pages=4, page_tokens=8)
    assert torch.equal(third.forward(batch(8, [(Trail(8, [0, 1]), [1, 2, 3])])), first)
    assert again.shape == first.shape
    assert not (tmp_path / "model.safetensors").exists()


def test_random_weights_of_a_quantised_configuration_are_no_question_of_quantisation(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "gptq"}}))
    assert describe(f"random:{path}").layers == 3
    with pytest.raises(EngineFault, match="gptq"):
        describe(tmp_path)


def test_the_tower_beside_a_language_model_is_left_unread(tmp_path: Path) -> None:
    folder = make_checkpoint(random_config("kimi_k25", 5), tmp_path)
    held = load_file(folder / "model.safetensors")
    assert all(name.startswith("language_model.") for name in held)
    tower = {"vision_tower.encoder.blocks.0.wqkv.weight": torch.ones(3), "mm_projector.proj.0.weight": torch.ones(2, 2)}
    save_file(held | tower, folder / "model.safetensors")
    info = load(folder, pages=4).info
    assert "vision tower" in info.notice and math.isfinite(info.weight_bytes)
    save_file(held | {"other.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(EngineFault, match=r"does not explain, first other\.weight"):
        load(folder, pages=4)


def test_no_shared_experts_may_be_written_as_empty_matrices(tmp_path: Path) -> None:
    folder = make_checkpoint(CONFIG | {"n_shared_experts": 0}, tmp_path)
    held = load_file(folder / "model.safetensors")
    at = "model.layers.1.mlp.shared_experts."
    assert not any(name.startswith(at) for name in held)
    empty = {at + "gate_proj.weight": torch.ones(0, 48), at + "down_proj.weight": torch.ones(48, 0)}
    save_file(held | empty, folder / "model.safetensors")
    assert load(folder, pages=4).info.layers == 3


def test_a_source_says_which_family_a_folder_is(tmp_path: Path) -> None:
    folder = make_checkpoint(random_config("qwen3", 6), tmp_path)
    source = read_source(folder)
    assert source.family.name == "Qwen3" and source.eos_ids == (257,) and not source.random


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("end", "words"), [(300, "is outside the vocabulary of 300"), ("stop", "is not an integer")])
def test_a_wrong_end_id_is_told_with_the_file_that_has_it(tmp_path: Path, file: str, end: Any, words: str) -> None:
    folder = make_checkpoint(CONFIG, tmp_path)
    path = folder / file
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | {"eos_token_id": [257, end]}))
    with pytest.raises(EngineFault) as caught:
        describe(folder)
    assert caught.value.message == f"{file}: eos_token_id {end!r} {words}."


_MLA = {
    "max_position_embeddings": 4096, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}  # fmt: skip
_V3 = _MLA | {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256, "q_lora_rank": 1536,
}  # fmt: skip
_LITE = _MLA | {
    "hidden_size": 2048, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "q_lora_rank": None,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip


@pytest.mark.parametrize("nested", ["rope_scaling", "rope_parameters"])
def test_a_context_is_as_long_as_the_angles_are_stretched(nested: str, tmp_path: Path) -> None:
    """As Qwen's makers say how to read longer texts: they have yarn added, and leave max_position_embeddings."""
    plain = random_config("qwen3", 1) | {"max_position_embeddings": 40960, "rope_scaling": None}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    if nested == "rope_parameters":
        yarn["rope_theta"] = 1e6
    (tmp_path / "config.json").write_text(json.dumps(plain | {nested: yarn}))
    assert describe(tmp_path).context_limit == 131072
    (tmp_path / "config.json").write_text(json.dumps(plain | {nested: yarn | {"factor": 1.0}}))
    assert describe(tmp_path).context_limit == 40960


_QWEN3 = {"max_position_embeddings": 40960, "vocab_size": 151936, "num_attention_heads": 32, "head_dim": 128}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "DeepSeek-V3": (_V3 | {"model_type": "deepseek_v3"}, 671_026_419_200),
    "Kimi K2": (
        _V3 | {"model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "n_routed_experts": 384,
               "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        1_026_408_232_448),
    "DeepSeek-V2-Lite": (
        _LITE | {"model_type": "deepseek_v2", "vocab_size": 102400, "intermediate_size": 10944}, 15_706_484_224),
    "Moonlight": (
        _LITE | {"model_type": "deepseek_v3", "vocab_size": 163840, "intermediate_size": 11264}, 15_960_110_208),
    "Youtu-LLM-2B as it was first published": (
        _MLA | {"model_type": "youtu_llm", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144,
                "num_hidden_layers": 32, "num_attention_heads": 16, "q_lora_rank": 1536},
        1_961_560_064),
    "Llama 3.1 8B": (
        {"model_type": "llama", "max_position_embeddings": 131072, "vocab_size": 128256, "hidden_size": 4096,
         "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        8_030_261_248),
    "Qwen3-8B": (
        _QWEN3 | {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                  "num_key_value_heads": 8},
        8_190_735_360),
    "Qwen3-30B-A3B": (
        _QWEN3 | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
                  "num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768},
        30_532_122_624),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "parameters"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_models_have_as_many_parameters_as_they_are_known_for(
    raw: dict[str, Any], parameters: int, tmp_path: Path
) -> None:
    """Layers for drafting left out; no weights are needed to tell."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert describe(tmp_path).parameters == parameters
