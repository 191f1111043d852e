"""How weights are stored is read from what the folder declares and from the tensors; the rest is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import describe, load
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
WEIGHT = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(CONFIG, tmp_path / "model", seed=2)


def declare(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path)


def refusal(folder: Path) -> EngineFault:
    with pytest.raises(EngineFault) as caught:
        load(folder, pages=4)
    assert caught.value.remedy
    return caught.value


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def packed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "input_activations": None, "weights": INT4 | weights}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


DECLARED: list[tuple[Any, str]] = [
    (packed(symmetric=False), "(format pack-quantized, symmetric False)"),
    (packed(num_bits=8), "(format pack-quantized, num_bits 8)"),
    (packed(strategy="channel", group_size=None), "(format pack-quantized, strategy channel)"),
    (packed(actorder="group"), "(format pack-quantized, actorder group)"),
    ({"bits": 4, "group_size": 64}, "'mlx' (bits 4, group_size 64)"),
    (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "'compressed-tensors' (format pack-quantized)",
    ),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "'gptq' (bits 4, group_size 128)"),
    ({"quant_method": "awq", "bits": 4}, "'awq' (bits 4)"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' (load_in_4bit True)"),
    ({"quant_method": "fbgemm_fp8"}, "'fbgemm_fp8'"),
    ({"quant_method": "mxfp4"}, "'mxfp4'"),
    ({"quant_method": "modelopt"}, "'modelopt'"),
    ({"quant_method": "fp8"}, "without weight_block_size"),
    (BLOCKS | {"weight_block_size": None}, "without weight_block_size"),
    (BLOCKS | {"weight_block_size": [64, 64]}, "weight_block_size [64, 64]"),
    (BLOCKS | {"weight_block_size": [1, 128]}, "weight_block_size [1, 128]"),
    (BLOCKS | {"weight_block_size": 128}, "weight_block_size 128"),
    (BLOCKS | {"fmt": "e5m2"}, "fmt 'e5m2'"),
    (BLOCKS | {"activation_scheme": "static"}, "activation_scheme 'static'"),
    (BLOCKS | {"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
]


@pytest.mark.parametrize(("declared", "words"), DECLARED, ids=[case[1] for case in DECLARED])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_declared_quantisation_that_is_not_implemented_is_refused_by_name_without_any_weights(
    folder: Path, declared: Any, words: str, key: str
) -> None:
    declare(folder, **{key: declared})
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineFault) as caught:
        describe(folder)
    assert caught.value.code == "unsupported_model"
    assert words in caught.value.message
    assert "fp8 e4m3" in caught.value.remedy and "Download" not in caught.value.remedy


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_quantisation_that_is_declared_in_a_file_of_its_own_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    fault = refusal(folder)
    assert fault.code == "unsupported_model" and name in fault.message


@pytest.mark.parametrize("declared", ["fp8", ["fp8"], 8, {"ignore": []}])
def test_a_declaration_that_says_nothing_is_refused(folder: Path, declared: Any) -> None:
    declare(folder, quantization_config=declared)
    fault = refusal(folder)
    assert fault.code == "bad_config" and "quantization_config" in fault.message


@pytest.mark.parametrize("declared", [None, {}, BLOCKS, BLOCKS | {"scale_fmt": "ue8m0"}])
def test_blocks_of_128_and_no_quantisation_load(folder: Path, declared: Any) -> None:
    declare(folder, quantization_config=declared)
    assert load(folder, pages=4).info.layers == 3


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e5m2, torch.bool])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_weight_of_a_format_that_is_not_implemented_is_refused_by_its_name(
    folder: Path, kind: torch.dtype, scaled: bool
) -> None:
    """With block scales beside it as well: they are not what makes a format known."""
    rewrite(folder, **{WEIGHT: torch.ones(64, 48).to(kind)})
    if scaled:
        rewrite(folder, **{WEIGHT + "_scale_inv": torch.ones(1, 1)})
    fault = refusal(folder)
    assert fault.code == "unsupported_model"
    assert f"{WEIGHT} is stored as" in fault.message


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ],
)
def test_integers_under_any_weights_name_are_refused(folder: Path, name: str) -> None:
    held = load_file(folder / "model.safetensors")[name]
    rewrite(folder, **{name: torch.ones(held.shape, dtype=torch.int32)})
    assert f"{name} is stored as I32" in refusal(folder).message


def test_a_float_weight_with_a_scale_beside_it_is_refused(folder: Path) -> None:
    rewrite(folder, **{WEIGHT + "_scale_inv": torch.ones(1, 1)})
    fault = refusal(folder)
    assert f"{WEIGHT} is stored as F32 and has scales as well" in fault.message


@pytest.mark.parametrize("shape", [(1,), (), (2, 2), (64, 1), (1, 48)])
def test_scales_of_other_blocks_are_refused_as_such(folder: Path, shape: tuple[int, ...]) -> None:
    """Among them one for the whole tensor, and one for each row."""
    weight = torch.ones(64, 48).to(torch.float8_e4m3fn)
    rewrite(folder, **{WEIGHT: weight, WEIGHT + "_scale_inv": torch.ones(shape)})
    fault = refusal(folder)
    assert fault.code == "unsupported_model"
    assert "blocks of 128 × 128" in fault.message and "Download" not in fault.remedy


def test_scales_that_are_no_floats_are_refused(folder: Path) -> None:
    weight = torch.ones(64, 48).to(torch.float8_e4m3fn)
    rewrite(folder, **{WEIGHT: weight, WEIGHT + "_scale_inv": torch.ones(1, 1, dtype=torch.uint8)})
    assert "_scale_inv is stored as U8" in refusal(folder).message


def test_fp8_of_one_dimension_is_refused(folder: Path) -> None:
    name = "model.norm.weight"
    rewrite(folder, **{name: torch.ones(48).to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(1)})
    assert "Only matrices" in refusal(folder).remedy


PACKED = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "input_scale", "weight_zero_point")


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("instead", [False, True])
def test_packed_weights_that_nobody_declared_are_refused_as_quantised(folder: Path, suffix: str, instead: bool) -> None:
    """Beside the weight or in its place: neither is a checkpoint to download again."""
    path = folder / "model.safetensors"
    held = load_file(path)
    if instead:
        del held[WEIGHT]
    save_file(held | {WEIGHT.removesuffix("weight") + suffix: torch.ones(2, 2, dtype=torch.int32)}, path)
    fault = refusal(folder)
    assert fault.code == "unsupported_model"
    assert suffix in fault.message and "quantised" in fault.message


def test_block_scales_multiply_right_whether_declared_or_not(tmp_path: Path) -> None:
    """Sizes over one block, and rows and columns of blocks that differ."""
    config = CONFIG | {"hidden_size": 160, "intermediate_size": 200}
    folder = make_checkpoint(config, tmp_path, seed=4)
    whole = load_file(folder / "model.safetensors")[WEIGHT]
    scales = torch.tensor([[0.5, 2.0], [4.0, 0.25]])
    wide = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :160]
    stored = (whole / wide).to(torch.float8_e4m3fn)
    rewrite(folder, **{WEIGHT: stored.float() * wide})
    wanted = load(folder, pages=4).forward(batch(64, [(Trail(64, [0]), [5, 6])]))
    rewrite(folder, **{WEIGHT: stored, WEIGHT + "_scale_inv": scales})
    for declared in (None, BLOCKS):
        declare(folder, quantization_config=declared)
        assert torch.equal(load(folder, pages=4).forward(batch(64, [(Trail(64, [0]), [5, 6])])), wanted)


OUTSIDE = ["../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors", "weights.bin", 7, None, ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, name: Any) -> None:
    (folder.parent / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    fault = refusal(folder)
    assert fault.code == "bad_weights"
    assert "no safetensors file inside the model folder" in fault.message


def test_a_tensor_that_two_files_hold_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, folder / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": "other.safetensors", "lm_head.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.norm.weight is in two files" in refusal(folder).message


def test_a_quantisation_by_mlx_is_refused_by_name_before_any_weight_is_read(folder: Path) -> None:
    """Older folders of MLX say it under a key of their own, and nowhere else."""
    declare(folder, quantization={"bits": 4, "group_size": 64})
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineFault, match=r"'mlx' \(bits 4, group_size 64\)") as caught:
        describe(folder)
    assert caught.value.code == "unsupported_model"
