"""What a load leaves behind, and what it says on its way."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.shard_file import ShardFile
from bench import load as load_bench
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint

BESIDE = 12
"""MB of a load beside what stays and the matrix at hand: rows on the way to other formats, chunks of files, objects."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(CONFIG, tmp_path_factory.mktemp("model"), dtype="float32")


def test_progress_only_grows_and_ends_at_the_whole(folder: Path) -> None:
    told: list[float] = []
    _ = load(folder, pages=2, progress=told.append)
    assert told == sorted(told) and told[0] < 0.5 and told[-1] == pytest.approx(1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_of_the_file_stays_mapped_behind_a_model(folder: Path) -> None:
    """Else a machine needs room for the file beside the weights in the kernels' layout."""
    model = load(folder, pages=2)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    del model


def test_tensors_and_their_rows_are_those_of_the_library(folder: Path) -> None:
    file, whole = ShardFile(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(file.names) == set(whole)
    for name, wanted in whole.items():
        assert torch.equal(file.read(name), wanted)
    name = "model.embed_tokens.weight"
    assert torch.equal(file.read(name, slice(7, 30)), whole[name][7:30])
    assert torch.equal(file.read(name, columns=slice(5, 21)), whole[name][:, 5:21])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_in_parts_at_once_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    held = torch.randn(3000, 700, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"one": held}, tmp_path / "model.safetensors")
    with ThreadPoolExecutor(4) as readers:
        file = ShardFile(tmp_path / "model.safetensors", readers)
        assert torch.equal(file.read("one"), held)
        assert torch.equal(file.read("one", rows=slice(11, 2900)), held[11:2900])
        assert torch.equal(file.read("one", columns=slice(350, 525)), held[:, 350:525])


@pytest.mark.parametrize("columns", [slice(0, 5000), slice(5000, 10_000)])
def test_wide_columns_are_those_of_the_tensor(tmp_path: Path, columns: slice) -> None:
    held = torch.arange(70_000, dtype=torch.float32).view(7, 10_000)
    save_file({"one": held}, tmp_path / "model.safetensors")
    assert torch.equal(ShardFile(tmp_path / "model.safetensors").read("one", columns=columns), held[:, columns])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("shape", "way"), [
    ("dense", "quantised to int8"), ("dense", "fp8 to bfloat16"), ("dense", "fp8 to int8"),
    ("experts", "bfloat16"), ("experts", "fp8 as it is"), ("experts", "fp8 to int8-32"),
])  # fmt: skip
def test_a_load_takes_one_matrix_in_16_bits_beside_what_stays(tmp_path: Path, shape: str, way: str) -> None:
    config = load_bench.SHAPES[shape] | {"num_hidden_layers": 3, "vocab_size": 512}
    folder = load_bench.made(config, tmp_path, load_bench.WAYS[way])
    stored = ShardFile(folder / "model.safetensors")
    most = 2 * max(math.prod(stored.shape(name)) for name in stored.names) / 1e6 + BESIDE
    # On busy cores the threads that read hold more at once: what the load itself needs is the least of a few.
    assert any(load_bench.measured(folder, way)["beyond_MB"] <= most for _ in range(3))


def test_a_file_that_is_cut_while_it_is_read_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    _ = path.write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def cut(_: float) -> None:
        with path.open("r+b") as file:
            _ = file.truncate(20_000)

    with pytest.raises(EngineFault, match="cannot be read"):
        _ = load(tmp_path, pages=2, progress=cut)
