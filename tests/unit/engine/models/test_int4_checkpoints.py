"""Checkpoints of compressed-tensors in 4 bits compute what the values that they stand for compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import load, read_source
from agentspeed_engine.models.int4_groups import unpacked
from agentspeed_engine.models.loaded import weight_source
from agentspeed_engine.models.weights import Part
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

GROUP = 16
LARGE = CONFIG | {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
           "actorder": None, "dynamic": False}  # fmt: skip
DECLARED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": WEIGHTS, "input_activations": None, "output_activations": None}},
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "kv_cache_scheme": None,
}
EXPERT = "model.layers.1.mlp.experts.0."
UP = EXPERT + "up_proj.weight"


def packed(values: Tensor) -> Tensor:
    """As the format has it: each value of -8 to 7 plus 8, eight to a word, the first in the lowest bits."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for i in range(8):
        words |= (values[:, i::8].long() + 8) << (4 * i)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def folders(root: Path, **fields: Any) -> tuple[Path, Path]:
    """(A checkpoint whose experts are packed, one with the values that they stand for.)"""
    plain = make_checkpoint(LARGE, root / "plain", seed=3)
    noise = torch.Generator().manual_seed(5)
    whole, stored = load_file(plain / "model.safetensors"), {}
    for name, tensor in list(whole.items()):
        if ".experts." not in name:
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        values = torch.randint(-8, 8, (rows, columns), generator=noise)
        scales = (0.02 * torch.rand(rows, columns // GROUP, generator=noise) + 0.01).bfloat16()
        whole[name] = values.float() * scales.float().repeat_interleave(GROUP, 1)
        stored |= {
            f"{name}_packed": packed(values),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor([rows, columns]),
        }
    save_file(whole, plain / "model.safetensors")
    made = make_checkpoint(LARGE, root / "packed", seed=3)
    save_file(stored, made / "model.safetensors")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": DECLARED} | fields))
    return made, plain


@pytest.mark.parametrize("weights", [None, "int8"])
def test_it_computes_what_its_values_compute(tmp_path: Path, weights: Any) -> None:
    logits = []
    for folder in folders(tmp_path):
        model = load(folder, pages=4, page_tokens=8, weights=weights)
        logits.append(model.forward(batch(8, [(Trail(8, [0, 1]), [5, 6, 7, 8, 9])])))
    assert torch.equal(*logits)


def test_every_value_and_sign_is_unpacked() -> None:
    values = torch.arange(-8, 8).repeat(3, 2)[:, torch.randperm(32, generator=torch.Generator().manual_seed(2))]
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25], [3.0, 1.5]], dtype=torch.bfloat16)
    assert torch.equal(unpacked(packed(values), scales), values * scales.float().repeat_interleave(GROUP, 1))


def test_a_piece_is_read_as_the_piece_of_the_whole(tmp_path: Path) -> None:
    source = weight_source(read_source(folders(tmp_path)[0]), "float32")
    for name, dim in ((EXPERT + "gate_proj.weight", 0), (EXPERT + "down_proj.weight", 1)):
        whole = source.tensor(name)
        for index in range(2):
            part = Part(dim, index, 2)
            assert torch.equal(source.tensor(name, part=part), part.of(whole))
    with pytest.raises(EngineFault, match="int4 in groups of 16"):
        source.expect({EXPERT + "down_proj.weight": Part(1, 0, 4)})


@pytest.mark.parametrize(
    "other", [{"num_bits": 8}, {"symmetric": False}, {"actorder": "group"}, {"type": "float"}, {"strategy": "channel"}]
)
def test_other_ways_to_pack_are_refused_by_name(tmp_path: Path, other: dict[str, Any]) -> None:
    groups = {"group_0": {"weights": WEIGHTS | other}}
    folder, _ = folders(tmp_path, quantization_config=DECLARED | {"config_groups": groups})
    with pytest.raises(EngineFault, match="compressed-tensors") as caught:
        _ = load(folder, pages=2)
    assert caught.value.code == "unsupported_model"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held | {UP + "_packed": torch.zeros(32, 4, dtype=torch.int32)}, "no matrix of"),
        (
            lambda held: held | {UP + "_packed": torch.zeros(32, 8, dtype=torch.int64)},
            "packed as I64",
        ),
        (lambda held: held | {UP: torch.zeros(32, 64)}, "is there, and"),
        (lambda held: {name: one for name, one in held.items() if name != UP + "_scale"}, "lacks 1"),
    ],
    ids=["shape", "kind", "twice", "no scale"],
)
def test_parts_that_make_no_matrix_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    folder, _ = folders(tmp_path)
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(EngineFault, match=words):
        _ = load(folder, pages=2)
