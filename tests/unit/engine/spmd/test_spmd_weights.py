"""Each rank reads its own pieces of a checkpoint and nothing else, however many files the checkpoint is in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import weight_source
from agentspeed_engine.models.mesh_fit import check_mesh
from agentspeed_engine.models.pieces import part_of
from agentspeed_engine.spmd.experts import ExpertSpread
from agentspeed_engine.spmd.placement import Mesh, Rank
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import Platform
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from tests.support.logical_ranks import assert_equal_to_one
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint

SENT = ExpertSpread(exchange="all_to_all")
PLAIN = Platform(device="cpu", arch="any", features=frozenset())


def read_by(folder: Path, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that a rank takes of the data of the files."""
    real, taken = os.preadv, [0]

    def counted(file: int, buffers: Any, offset: int) -> int:
        found = real(file, buffers, offset)
        taken[0] += found
        return found

    source = read_source(folder)
    family, config = source.family, source.config
    pools = KvPools(family.kv_layout(config, "float32", rank.mesh), 1, 8)
    weights = weight_source(source, "float32")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        kernels = Kernels(standard(), PLAIN, "float32", tuple(OPS))
        try:
            family.build(config, weights, pools, rank, kernels)
        except EngineFault as fault:
            assert not taken[0], "it was refused only after something was read"
            raise fault
    return taken[0]


def in_files(folder: Path, count: int) -> Path:
    """The same checkpoint, its tensors dealt out to `count` files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{index % count}.safetensors" for index, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name, own in names.items() if own == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=4), Mesh(dp=2), Mesh(dp=2, tp=2, experts=SENT)], ids=str)
def test_ranks_read_their_own_bytes_alone(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut along rows is read once by all ranks that cut it together; what each has whole is read by each,
    and so is what is cut along narrow columns."""
    folder = make_checkpoint(CONFIG, tmp_path, seed=4)
    sizes = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    cut_over_tp = ("embed_tokens", "lm_head", "q_b_proj", "kv_b_proj", "o_proj", "layers.0.mlp")
    wanted = 0
    for name, size in sizes.items():
        part = part_of(name, next(iter(mesh.ranks())))
        if part is not None and part.dim == 1:
            size *= part.count
        if ".experts." in name:
            wanted += size
        elif "shared_experts" in name:
            wanted += size * (mesh.dp if mesh.experts == SENT else 1)
        elif any(part in name for part in cut_over_tp):
            wanted += size * mesh.dp
        else:
            wanted += size * mesh.size
    assert sum(read_by(folder, rank, monkeypatch) for rank in mesh.ranks()) == wanted


@pytest.mark.parametrize("files", [1, 3, 8])
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(dp=2, tp=2, experts=SENT)], ids=["two", "four"])
def test_a_checkpoint_in_any_number_of_files_loads_on_any_number_of_ranks(
    tmp_path: Path, files: int, mesh: Mesh
) -> None:
    folder = in_files(make_checkpoint(CONFIG, tmp_path, seed=4, dtype="float64"), files)
    assert_equal_to_one(folder, mesh, [[[5, 6, 7], [8]][: mesh.dp]])


LARGE = CONFIG | {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 2,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "kv_lora_rank": 128,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The matrices of attention and feed-forwards in fp8 blocks, as DeepSeek publishes them."""
    folder = make_checkpoint(LARGE | {"quantization_config": FP8}, tmp_path_factory.mktemp("fp8"), seed=4)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if name.endswith("_proj.weight"):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            rows, columns = (-(-extent // 128) for extent in tensor.shape)
            tensors[name + "_scale_inv"] = torch.arange(1, rows * columns + 1).view(rows, columns) / 8.0
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_pieces_of_fp8_blocks_come_with_their_own_scales(blocks: Path) -> None:
    assert_equal_to_one(blocks, Mesh(tp=2), [[[5, 6, 7]], [[9]]])


def test_a_cut_through_an_fp8_block_is_refused_before_anything_is_read(
    blocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, mesh = read_source(blocks), Mesh(tp=4)
    with pytest.raises(EngineFault, match=r"is fp8 in blocks of 128 × 128, and .* over 4 ranks are .*through a block"):
        read_by(blocks, mesh.rank(0), monkeypatch)
    with pytest.raises(EngineFault, match="cut goes through a block"):  # by the configuration alone, for a plan
        check_mesh(source, mesh)
