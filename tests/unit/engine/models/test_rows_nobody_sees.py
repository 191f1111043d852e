"""Rows of a page that no branch sees change nothing, whatever was left there: not even by being no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_kernels.signature import Dtype
from tests.conformance.family_configs import random_config
from tests.devices import DEVICES
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

PAGE = 16
IDS = np.random.default_rng(5).integers(0, 300, 400).tolist()
WIDE = CONFIG | {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
CONFIGS = {
    "latent": WIDE,
    "grouped": random_config("qwen3", 0) | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "sparse": WIDE | {
        "model_type": "glm_moe_dsa", "index_n_heads": 16, "index_head_dim": 20, "index_topk": 40,
        "indexer_types": ["full", "shared", "full"],
    },
}  # fmt: skip


def steps() -> list[FlatBatch]:
    """A prompt in two chunks, one long, then three forks of it that draw, and one that reads on, beside another."""
    prompt, other = Trail(PAGE, list(range(8))), Trail(PAGE, [30, 31])
    given = [[(prompt, IDS[:20])], [(prompt, IDS[20:128])]]
    forks = [Trail(PAGE, [*range(8), 10 + i], shared=128, known=128) for i in range(3)]
    given += [[(fork, IDS[200 + i + at : 201 + i + at]) for i, fork in enumerate(forks)] for at in range(2)]
    given.append([(forks[0], IDS[300:306]), (other, IDS[:5])])
    return [named(batch(PAGE, one)) for one in given]


def named(step: FlatBatch) -> FlatBatch:
    """With the rows behind each branch's last one."""
    ends = [(run.pages[-1] * PAGE, (run.tokens - 1) % PAGE + 1) for run in step.runs if run.causal]
    hidden = np.concatenate([np.arange(page + held, page + PAGE, dtype=np.int64) for page, held in ends])
    return FlatBatch(ids=step.ids, positions=step.positions, slots=step.slots, runs=step.runs, select=step.select,
                     hidden=hidden)  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(CONFIGS[kind], tmp_path_factory.mktemp("model"), seed=6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_nobody_sees_change_no_bit(folder: Path, dtype: Dtype, device: Any) -> None:
    def logits(left: float) -> list[torch.Tensor]:
        model: LoadedModel = load(folder, dtype=dtype, pages=40, page_tokens=PAGE, device=device)
        for pool in model.pools.tensors:
            pool.fill_(left)
        return [model.forward(step).clone() for step in steps()]

    for after_numbers, after_none in zip(logits(0.0), logits(float("nan")), strict=True):
        assert bool(torch.isfinite(after_none).all())
        assert torch.equal(after_none, after_numbers)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_nor_do_they_in_a_cache_in_fp8(kind: str, folder: Path, dtype: Dtype) -> None:
    """Bytes of all ones are no numbers, and scales that are none."""
    if kind == "sparse":
        pytest.skip("sparse attention keeps no cache in fp8")

    def logits(left: int) -> list[torch.Tensor]:
        model = load(folder, dtype=dtype, pages=40, page_tokens=PAGE, cache="fp8")
        for pool in model.pools.tensors:
            pool.fill_(left)
        return [model.forward(step).clone() for step in steps()]

    for after_numbers, after_none in zip(logits(0), logits(255), strict=True):
        assert bool(torch.isfinite(after_none).all())
        assert torch.equal(after_none, after_numbers)
