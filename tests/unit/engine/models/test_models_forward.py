"""What must not change logits: pages, sharing, batching, chunking; and what page moves must preserve. In float64."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.exec.arena import HostArena
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.models.memory import zeros_on_demand
from tests.conformance.family_configs import random_config
from tests.devices import DEVICES
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

PAGE = 8
IDS = np.random.default_rng(5).integers(0, 300, 400).tolist()


GROUPED = random_config("qwen3_moe", 0) | {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "num_experts": 8, "num_experts_per_tok": 3, "decoder_sparse_step": 1, "mlp_only_layers": [0],
}  # fmt: skip


SPARSE = CONFIG | {
    "model_type": "glm_moe_dsa", "index_n_heads": 16, "index_head_dim": 12, "index_topk": 40,
    "indexer_types": ["full", "shared", "full"],
}  # fmt: skip


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "latent": (CONFIG, None),
    "grouped": (GROUPED, None),
    "sparse": (SPARSE, None),
    "latent-fp8-cache": (CONFIG, "fp8"),
    "grouped-fp8-cache": (GROUPED | {"head_dim": 20}, "fp8"),
}
"""One pool of latents, two of keys and values, and latents beside the keys of an indexer, which has fewer layers and
chooses fewer tokens than most of these contexts have. A row in 8 bits is rounded once, when it is written: what reads
it reads the same numbers whatever step wrote them."""


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Any]:
    """A configuration, and the format of its cache."""
    found: tuple[dict[str, Any], Any] = request.param
    return found


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def model(case: tuple[dict[str, Any], Any], device: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    config, cache = case
    if cache is not None and device == "cuda":
        pytest.skip("on a GPU nothing reads a cache in 8 bits in float64")
    folder = make_checkpoint(config, tmp_path_factory.mktemp("model"), seed=6, dtype="float64")
    return load(folder, dtype="float64", pages=256, page_tokens=PAGE, device=device, cache=cache)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return float((left - right).abs().max()) < 1e-10


def fresh(model: LoadedModel, ids: list[int], first_page: int = 200) -> torch.Tensor:
    trail = Trail(PAGE, list(range(first_page, first_page + 56)))
    return model.forward(batch(PAGE, [(trail, ids)]))


def test_scattered_pages_are_the_same_context(model: LoadedModel) -> None:
    scattered = Trail(PAGE, np.random.default_rng(0).permutation(100).tolist())
    assert close(model.forward(batch(PAGE, [(scattered, IDS[:90])])), fresh(model, IDS[:90]))


@pytest.mark.parametrize("cuts", [[1] * 40, [7, 13, 20], [39, 1], [300, 60], [170, 165, 25], [3, 357]])
def test_chunks_are_the_whole(model: LoadedModel, cuts: list[int]) -> None:
    """On both sides of the row count from which the context is decompressed."""
    ids = IDS[: sum(cuts)]
    trail, parts, at = Trail(PAGE, list(range(60))), [], 0
    for size in cuts:
        parts.append(model.forward(batch(PAGE, [(trail, ids[at : at + size])])))
        at += size
    assert close(torch.cat(parts), fresh(model, ids))


def test_branches_below_a_shared_prefix_are_as_if_alone(model: LoadedModel) -> None:
    prefix = Trail(PAGE, list(range(4)))
    model.forward(batch(PAGE, [(prefix, IDS[:32])]))
    branches = [Trail(PAGE, [0, 1, 2, 3, 10 + i, 20 + i], shared=32, known=32) for i in range(5)]
    suffixes = [IDS[40 + 3 * i : 41 + 5 * i] for i in range(5)]
    together = model.forward(batch(PAGE, list(zip(branches, suffixes, strict=True)), select="last"))
    for row, suffix in zip(together, suffixes, strict=True):
        assert close(row, fresh(model, IDS[:32] + suffix)[-1])


def test_a_long_prompt_and_decoding_branches_share_a_step_and_a_prefix(model: LoadedModel) -> None:
    """Some rows take the absorbed path, some the decompressed one."""
    prefix = Trail(PAGE, list(range(4)))
    model.forward(batch(PAGE, [(prefix, IDS[:32])]))
    pages = [0, 1, 2, 3]
    long = Trail(PAGE, [*pages, *range(50, 90)], shared=32, known=32)
    short = Trail(PAGE, [*pages, 10], shared=32, known=32)
    other = Trail(PAGE, [11, 12])
    rows = model.forward(batch(PAGE, [(short, [7]), (long, IDS[32:300]), (other, IDS[:9])], select="last"))
    wanted = [fresh(model, ids)[-1] for ids in ([*IDS[:32], 7], IDS[:300], IDS[:9])]
    assert all(close(row, alone) for row, alone in zip(rows, wanted, strict=True))


def test_nothing_selected_gives_no_logits_but_the_rows_are_written(model: LoadedModel) -> None:
    trail = Trail(PAGE, [30, 31])
    step = batch(PAGE, [(trail, IDS[:10])], select="none")
    silent = type(step)(
        ids=step.ids, positions=step.positions, slots=step.slots, runs=step.runs, select=np.zeros(0, np.int64)
    )
    assert model.forward(silent).shape == (0, 300)
    assert close(model.forward(batch(PAGE, [(trail, [IDS[10]])])), fresh(model, IDS[:11])[-1:])


def test_copied_rows_continue_like_the_original(model: LoadedModel) -> None:
    trail = Trail(PAGE, [40, 41])
    model.forward(batch(PAGE, [(trail, IDS[:13])]))
    model.copy_rows(41, 45, 5)
    child = Trail(PAGE, [40, 45], known=13)
    assert close(model.forward(batch(PAGE, [(child, [9])])), fresh(model, [*IDS[:13], 9])[-1:])


def test_pages_survive_the_way_to_host_memory_and_back(model: LoadedModel) -> None:
    trail = Trail(PAGE, [46, 47])
    model.forward(batch(PAGE, [(trail, IDS[:16])]))
    arena = HostArena(model.pools.tensors, 3)
    arena.save([46, 47], [2, 0])
    model.forward(batch(PAGE, [(Trail(PAGE, [46, 47]), IDS[100:116])]))
    arena.load([2, 0], [120, 119])
    moved = Trail(PAGE, [120, 119, 121], known=16)
    assert close(model.forward(batch(PAGE, [(moved, [3])])), fresh(model, [*IDS[:16], 3])[-1:])


def test_a_mesh_of_one_runs_the_chain_without_collectives(model: LoadedModel) -> None:
    assert model.plan.collectives == ()
    assert len(model.plan.steps) == 1 + 4 * 3 + 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_formats_stay_near_float64(
    tmp_path: Path, case: tuple[dict[str, Any], Any], model: LoadedModel, dtype: str
) -> None:
    """Of a cache in 8 bits some numbers round to their neighbour."""
    config, cache = case
    folder = make_checkpoint(config, tmp_path, seed=6, dtype="float64")
    other = load(folder, dtype=dtype, pages=256, page_tokens=PAGE, cache=cache)  # type: ignore[arg-type]
    wanted, got = fresh(model, IDS[:60]).cpu(), fresh(other, IDS[:60]).double()
    # Positions where rounding flips an expert choice may differ widely in bfloat16, hence the median.
    error = float(((got - wanted).abs().amax(-1) / wanted.abs().max()).median())
    assert error < {"float32": 1e-5 if cache is None else 3e-3, "bfloat16": 6e-2}[dtype]


def test_a_pool_takes_memory_only_where_it_is_written() -> None:
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = zeros_on_demand((2**15, 2**15), torch.bfloat16)
    pool[5] = 1.0
    assert float(pool[4:7].sum()) == 2**15
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < pool.nbytes / 8
