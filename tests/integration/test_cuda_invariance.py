"""Models with batch_invariant on a GPU: rows have equal bits, whatever shares a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed.engine import NANO
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_kernels.triton.invariant import alike
from tests.devices import needs_gpu
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

pytestmark = [needs_gpu, pytest.mark.timeout(300)]

PAGE = 64
IDS = np.random.default_rng(5).integers(0, 300, 2600).tolist()
V2_LITE = CONFIG | {
    "hidden_size": 512, "intermediate_size": 1408, "moe_intermediate_size": 352, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 16, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
WIDE = V2_LITE | {"num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 256}
"""Heads that have the kernel of 64 rows."""
GROUPED = {
    "model_type": "qwen3_moe", "vocab_size": 300, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096,
    "num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 352, "mlp_only_layers": [0],
    "rope_theta": 5000.0, "norm_topk_prob": True, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


FP8 = ", cache in fp8"


@pytest.fixture(
    scope="module",
    params=[
        "nano",
        "16 heads",
        "64 heads",
        "grouped",
        f"nano{FP8}",
        f"16 heads{FP8}",
        f"64 heads{FP8}",
        f"grouped{FP8}",
    ],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    configs: dict[str, dict[str, Any]] = {"16 heads": V2_LITE, "64 heads": WIDE, "grouped": GROUPED}
    name: str = request.param.removesuffix(FP8)
    if name == "nano":
        folder: Path = NANO
    else:
        folder = make_checkpoint(configs[name], tmp_path_factory.mktemp("model"), seed=6, dtype="float32")
    cache: Any = "fp8" if name != request.param else None
    return load(
        folder, dtype="bfloat16", pages=240, page_tokens=PAGE, device="cuda", batch_invariant=True, cache=cache
    )  # fmt: skip


def test_blocks_of_16_and_of_32_rows_add_alike_here() -> None:
    assert alike(torch.device("cuda")) in ("narrow", "all")


def test_chunks_of_any_size_have_the_bits_of_one_chunk(model: LoadedModel) -> None:
    ids = IDS[:2048]
    held = []
    for first, chunk in ((0, 2048), (40, 64), (80, 700)):
        trail = Trail(PAGE, list(range(first, first + 40)))
        rows = [model.forward(batch(PAGE, [(trail, ids[at : at + chunk])])).clone() for at in range(0, 2048, chunk)]
        held.append((torch.cat(rows), [pool[:, first : first + 32].clone() for pool in model.pools.tensors]))
    for logits, pools in held[1:]:
        assert torch.equal(logits, held[0][0])
        assert all(torch.equal(pool, one) for pool, one in zip(pools, held[0][1], strict=True))


def test_rows_below_a_shared_trunk_have_the_bits_of_rows_alone_in_graphs_and_out_of_them(model: LoadedModel) -> None:
    trunk = Trail(PAGE, list(range(30)))
    model.forward(batch(PAGE, [(trunk, IDS[:1920])], select="none"))
    shared = list(range(30))
    forks = [Trail(PAGE, [*shared, 100 + i], shared=1920, known=1920) for i in range(9)]
    steps = [model.forward(batch(PAGE, [(fork, [7 * i + at]) for i, fork in enumerate(forks)])).clone()
             for at in range(6)]  # fmt: skip
    for i in (0, 4, 8):
        alone = Trail(PAGE, list(range(120, 160)))
        model.forward(batch(PAGE, [(alone, IDS[:1920])], select="none"))
        model.repeats = bool(i % 8)
        for at, rows in enumerate(steps):
            assert torch.equal(model.forward(batch(PAGE, [(alone, [7 * i + at])]))[0], rows[i])
        model.repeats = True
