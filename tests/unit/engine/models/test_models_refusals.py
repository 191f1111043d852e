"""A folder that is wrong is refused before it computes anything, with the reason and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import describe, load
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(CONFIG, tmp_path / "model", seed=2)


def change(folder: Path, **fields: Any) -> None:
    """None removes a field."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def refusal(folder: Path) -> EngineFault:
    with pytest.raises(EngineFault) as caught:
        load(folder, pages=4)
    return caught.value


CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "mamba"}, "unsupported_model", "model_type 'mamba' is not supported"),
    ({"model_type": None}, "unsupported_model", "model_type None is not supported"),
    ({"kv_lora_rank": None}, "bad_config", "kv_lora_rank is missing"),
    ({"hidden_size": -1}, "bad_config", "hidden_size is -1"),
    ({"hidden_size": "48"}, "bad_config", "hidden_size is '48'"),
    ({"num_hidden_layers": True}, "bad_config", "num_hidden_layers is True"),
    ({"num_key_value_heads": 2}, "bad_config", "num_key_value_heads 2 differs from num_attention_heads 4"),
    ({"qk_rope_head_dim": 7}, "bad_config", "qk_rope_head_dim 7 is odd"),
    ({"hidden_act": "gelu"}, "bad_config", "hidden_act 'gelu' is not silu"),
    ({"n_group": 3}, "bad_config", "n_routed_experts 8 does not divide into n_group 3"),
    ({"topk_group": 5}, "bad_config", "topk_group 5 is above n_group 4"),
    ({"num_experts_per_tok": 5}, "bad_config", "num_experts_per_tok 5 is above the 4 experts"),
    ({"topk_method": "greedy"}, "bad_config", "topk_method 'greedy' is unknown for deepseek_v3"),
    ({"scoring_func": "softmax"}, "bad_config", "scoring_func 'softmax' contradicts deepseek_v3"),
    ({"moe_layer_freq": 2}, "bad_config", "moe_layer_freq is not 1"),
    ({"eos_token_id": 300}, "bad_config", "eos_token_id 300 is outside the vocabulary of 300"),
    ({"eos_token_id": "stop"}, "bad_config", "eos_token_id 'stop' is not an integer"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "bad_config", "RoPE scaling 'linear' is not supported"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "bad_config", "original_max_position_embeddings is missing"),
    ({"mlp_bias": True}, "bad_config", "mlp_bias is true"),
    ({"num_hidden_layers": 10**9}, "bad_config", "num_hidden_layers is 1000000000"),
    ({"n_routed_experts": 10**9}, "bad_config", "n_routed_experts is 1000000000"),
    ({"num_hidden_layers": 1000, "n_routed_experts": 4096}, "bad_config", "n_routed_experts is 4096000"),
    ({"rms_norm_eps": float("inf")}, "bad_config", "rms_norm_eps is inf"),
    ({"routed_scaling_factor": 10**400}, "bad_config", "routed_scaling_factor is 1000"),
    ({"num_nextn_predict_layers": -1}, "bad_config", "num_nextn_predict_layers is -1"),
]
SIZES = [
    name
    for name, value in CONFIG.items()
    if isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_token_id")
]


@pytest.mark.parametrize(("fields", "code", "message"), CONTRADICTIONS, ids=[case[2] for case in CONTRADICTIONS])
def test_a_contradicting_config_is_refused(folder: Path, fields: dict[str, Any], code: str, message: str) -> None:
    change(folder, **fields)
    fault = refusal(folder)
    assert fault.code == code
    assert message in fault.message


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [10**9, 10**18, 10**400])
def test_a_size_beyond_any_model_is_refused_at_once_by_its_name(folder: Path, name: str, value: int) -> None:
    change(folder, **{name: value})
    with pytest.raises(EngineFault, match=name) as refused:
        describe(folder)
    assert refused.value.code == "bad_config" and refused.value.remedy


@pytest.mark.parametrize("text", ['{"hidden_size": ' + "1" * 5000 + "}", "[" * 100_000])
def test_a_config_that_python_cannot_read_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "cannot be read as JSON" in refusal(folder).message


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    fault = refusal(tmp_path / "nothing")
    assert fault.code == "bad_config"
    assert "is not a folder" in fault.message
    assert fault.remedy


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{'model_type'")
    assert "cannot be read as JSON" in refusal(folder).message


def test_a_config_that_is_a_list_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    assert "holds a list, not an object" in refusal(folder).message


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    fault = refusal(folder)
    assert fault.code == "bad_weights"
    assert "does not exist" in fault.message


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_a_truncated_shard_is_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    fault = refusal(folder)
    assert fault.code == "bad_weights"
    assert "damaged or cut short" in fault.message


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    held = load_file(path) | {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file({name: tensor for name, tensor in held.items() if tensors.get(name, tensor) is not None}, path)


def test_a_missing_tensor_is_refused_by_name(folder: Path) -> None:
    rewrite(folder, **{"model.layers.1.mlp.gate.weight": None})
    assert "lacks 1 tensors, first model.layers.1.mlp.gate.weight" in refusal(folder).message


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.ones(47)})
    assert "model.norm.weight has shape (47,), config.json says (48,)" in refusal(folder).message


def test_tensors_that_the_config_does_not_explain_are_refused(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.k_proj.weight": torch.ones(2, 2)})
    assert "does not explain, first model.layers.0.self_attn.k_proj.weight" in refusal(folder).message


def test_layers_behind_the_last_one_are_draft_layers_and_left_unread_where_the_config_says_so(folder: Path) -> None:
    """DeepSeek-V3 says 61 layers and 1 to predict with, and has tensors of layer 61."""
    rewrite(folder, **{f"model.layers.3.{name}": torch.ones(2, 2) for name in ("eh_proj.weight", "o.weight_scale_inv")})
    change(folder, num_nextn_predict_layers=1)
    assert load(folder, pages=4).info.layers == 3
    rewrite(folder, **{"model.layers.4.eh_proj.weight": torch.ones(2, 2)})
    assert "does not explain, first model.layers.4.eh_proj.weight" in refusal(folder).message


@pytest.mark.parametrize("drafts", [0, 1, None])
def test_a_config_with_fewer_layers_than_the_weights_is_refused(folder: Path, drafts: int | None) -> None:
    change(folder, num_hidden_layers=1, num_nextn_predict_layers=drafts)
    assert f"does not explain, first model.layers.{1 + (drafts or 0)}." in refusal(folder).message


def test_an_index_that_names_an_absent_shard_is_refused(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors does not exist" in refusal(folder).message


def test_an_empty_index_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(folder).message


def test_fp8_without_scales_is_refused(folder: Path) -> None:
    weight = torch.ones(48, 40).to(torch.float8_e4m3fn)
    rewrite(folder, **{"model.layers.0.self_attn.o_proj.weight": weight})
    assert "o_proj.weight is fp8 but" in refusal(folder).message


def test_an_unknown_dtype_and_an_empty_pool_are_refused(folder: Path) -> None:
    with pytest.raises(EngineFault, match="dtype 'int4' is unknown"):
        describe(folder, dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(EngineFault, match="0 pages"):
        load(folder, pages=0)


def test_every_refusal_tells_what_to_do(folder: Path) -> None:
    change(folder, model_type="qwen3_vl")
    assert refusal(folder).remedy.startswith("The nearest family that runs is qwen3. Supported are deepseek_v2, deepse")


def test_shards_and_one_file_are_the_same_model(folder: Path) -> None:
    whole = load(folder, pages=4).forward(batch(64, [(Trail(64, [0]), [1, 2, 3])]))
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    cut = load(folder, pages=4).forward(batch(64, [(Trail(64, [0]), [1, 2, 3])]))
    assert torch.equal(whole, cut)


def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    """Sizes over one block, so that rows and columns of blocks differ."""
    config = CONFIG | {"hidden_size": 160, "intermediate_size": 200}
    folder = make_checkpoint(config, tmp_path, seed=4)
    name = "model.layers.0.mlp.gate_proj.weight"
    whole = load_file(folder / "model.safetensors")[name]
    scales = torch.tensor([[0.5, 2.0], [4.0, 0.25]])
    wide = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :160]
    stored = (whole / wide).to(torch.float8_e4m3fn)
    rewrite(folder, **{name: stored.float() * wide})
    wanted = load(folder, pages=4).forward(batch(64, [(Trail(64, [0]), [5, 6])]))
    rewrite(folder, **{name: stored, name + "_scale_inv": scales})
    got = load(folder, pages=4).forward(batch(64, [(Trail(64, [0]), [5, 6])]))
    assert torch.equal(got, wanted)


def test_describe_needs_no_torch_and_counts_bytes(folder: Path) -> None:
    info = describe(folder, dtype="bfloat16", page_tokens=16)
    assert info.bytes_per_page == 3 * 16 * (24 + 8) * 2
    assert info.weight_bytes == 2 * sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert (info.vocab_size, info.context_limit, info.eos_ids) == (300, 4096, (257,))
    code = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r};"
        "from agentspeed_engine.models.catalog import describe;"
        f"describe({str(folder)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_end_ids_come_from_both_configs(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 260]}))
    assert describe(folder).eos_ids == (257, 260)
