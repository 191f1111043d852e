"""Logits of a batch-invariant model: a row has the same bits alone and among any others, however prompts are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from tests.conformance.family_configs import random_config
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

PAGE = 8
MOST = 72
IDS = np.random.default_rng(5).integers(0, 300, 700).tolist()
GROUPED = random_config("qwen3_moe", 0) | {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "num_experts": 8, "num_experts_per_tok": 3, "decoder_sparse_step": 1, "mlp_only_layers": [0],
}  # fmt: skip
KINDS = [("latent", "float32"), ("latent", "bfloat16"), ("grouped", "float32"), ("grouped", "bfloat16")]


@pytest.fixture(scope="module", params=KINDS, ids=" ".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    attention, dtype = request.param
    config: dict[str, Any] = CONFIG if attention == "latent" else GROUPED
    folder = make_checkpoint(config, tmp_path_factory.mktemp("model"), seed=6, dtype="float32")
    return load(folder, dtype=dtype, pages=400, page_tokens=PAGE, batch_invariant=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float64"}, "no batch-invariant kernel for linear in float64"),
        ({"weights": "int8"}, "no batch-invariant kernel for linear in float32"),
    ],
)
def test_what_has_no_batch_invariant_kernel_is_refused_by_name(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(CONFIG, tmp_path, seed=6, dtype="float32")
    with pytest.raises(EngineFault, match=said) as refused:
        load(folder, pages=4, page_tokens=PAGE, batch_invariant=True, **options)
    assert refused.value.code == "bad_options" and "Leave batch_invariant out" in refused.value.remedy


def token_by_token(model: LoadedModel, ids: list[int], first_page: int = 300) -> Tensor:
    """Each row in a step of its own."""
    trail = Trail(PAGE, list(range(first_page, first_page + 90)))
    return torch.cat([model.forward(batch(PAGE, [(trail, [one])])) for one in ids])


def cuts_of(draw: Callable[[int], int], length: int) -> list[int]:
    left, cuts = length, []
    while left:
        cuts.append(1 + draw(min(left, MOST) - 1))
        left -= cuts[-1]
    return cuts


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_of_any_steps_have_the_bits_of_rows_alone(model: LoadedModel, data: st.DataObject) -> None:
    """Several prompts of any length below one prefix or none, in steps of any chunks of them."""
    draw = lambda most: data.draw(st.integers(0, most))  # noqa: E731
    shared = PAGE * draw(5)
    prefix = Trail(PAGE, list(range(6)))
    if shared:
        model.forward(batch(PAGE, [(prefix, IDS[:shared])]))
    prompts = [IDS[at : at + 1 + draw(50)] for at in (100, 200, 300, 400)]
    trails = [
        Trail(PAGE, [*range(shared // PAGE), *range(10 + 20 * i, 30 + 20 * i)], shared=shared, known=shared)
        for i in range(len(prompts))
    ]
    parts: list[list[Tensor]] = [[] for _ in prompts]
    waiting = [cuts_of(draw, len(prompt)) for prompt in prompts]
    at = [0] * len(prompts)
    while any(waiting):
        mine = [i for i, left in enumerate(waiting) if left and (draw(3) or not any(waiting[:i]))]
        sizes = [waiting[i].pop(0) for i in mine]
        step = [(trails[i], prompts[i][at[i] : at[i] + size]) for i, size in zip(mine, sizes, strict=True)]
        rows = model.forward(batch(PAGE, step)).split(sizes)
        for i, size, logits in zip(mine, sizes, rows, strict=True):
            at[i] += size
            parts[i].append(logits)
    for prompt, got in zip(prompts, parts, strict=True):
        alone = token_by_token(model, IDS[:shared] + prompt)[shared:]
        assert torch.equal(torch.cat(got), alone)


def test_a_prompt_has_the_bits_of_its_tokens_in_one_chunk_and_beyond_a_cut_of_attention(model: LoadedModel) -> None:
    """More tokens than a tile of attention has, and than torch's products and long extends begin at."""
    ids = IDS[:640]
    whole = model.forward(batch(PAGE, [(Trail(PAGE, list(range(80))), ids)]))
    trail = Trail(PAGE, list(range(80, 160)))
    model.forward(batch(PAGE, [(trail, ids[:500])], select="none"))
    rest = [model.forward(batch(PAGE, [(trail, [one])])) for one in ids[500:]]
    assert torch.equal(whole[500:], torch.cat(rest))
