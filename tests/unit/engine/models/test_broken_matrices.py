"""One number of one matrix that is none: no kernel makes logits of it that look like an answer.

A maximum, a bound below an exponent or a choice among scores can lose what is no number, and then nobody is told.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from agentspeed_engine.models.catalog import load
from tests.conformance.family_configs import random_config
from tests.support.decoded_logits import decoded_logits
from tests.support.random_checkpoint import make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = Path(__file__).parents[4] / "bench/models"
PAGE = 64
IDS = np.random.default_rng(5).integers(3, 250, 302).tolist()
CONFIGS: dict[str, dict[str, Any]] = {
    "latent": json.loads((MODELS / "tiny.json").read_text()),
    "grouped": json.loads((MODELS / "tiny-qwen3-moe.json").read_text()),
    "sparse": random_config("deepseek_v32", 1) | {"index_topk": 24},
}
BROKEN = [
    ("latent", "self_attn.kv_b_proj"), ("latent", "self_attn.q_b_proj"), ("latent", "mlp.gate"),
    ("grouped", "self_attn.k_proj"), ("grouped", "self_attn.q_proj"), ("grouped", "mlp.gate"),
    ("sparse", "self_attn.indexer.wk"), ("sparse", "self_attn.indexer.weights_proj"),
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [{}, {"cache": "fp8"}, {"weights": "int8"}, {"weights": "int8-32"}, {"weights": "fp8"}]


@pytest.mark.parametrize(("kind", "matrix"), BROKEN, ids=lambda one: one)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_matrix_that_has_no_number_gives_no_logits(kind: str, matrix: str, dtype: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(CONFIGS[kind], tmp_path, dtype="bfloat16")
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.1.{matrix}.weight"][1, 2] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    finite = {
        (tuple(options.items()), prompt): found
        for options in OPTIONS
        if kind != "sparse" or "cache" not in options
        for prompt in (1, 80, 300)
        if (found := _finite_rows(folder, dtype, prompt, options))
    }
    assert not finite


def _finite_rows(folder: Path, dtype: Any, prompt: int, options: dict[str, Any]) -> int:
    model = load(folder, dtype=dtype, pages=6, page_tokens=PAGE, **options)
    return int(decoded_logits(model, IDS[: prompt + 2], prompt, PAGE).isfinite().all(1).sum())
