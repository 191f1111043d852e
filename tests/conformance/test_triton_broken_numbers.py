"""What is no number stays none in the kernels of a GPU: their maxima and comparisons pass it over. Through the
interpreter."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_kernels.fp8_cache import CacheRow, heads_row, latent_row
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.triton import attention, backend, extend, grouped, invariant, kernels
from agentspeed_kernels.workspace import Workspace
from tests.support.forked_pieces import fork

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning", "ignore:All-NaN.*:RuntimeWarning")
"""NumPy warns of what a GPU says nothing of."""

CPU = torch.device("cpu")
EXPERTS, WIDTH, ROWS = 12, 16, 4
RULES = {
    f"{score}, {groups} groups, {normalise=}": RouteRule(
        score=score, top=3, groups=groups, top_groups=min(groups, 2), group_score="top2" if groups > 1 else "max",
        normalise=normalise, scale=1.5,
    )
    for score, groups, normalise in product(("sigmoid", "softmax"), (1, 4), (True, False))
}  # fmt: skip
"""Neither experts nor those of a group are a power of two: padding lies beside them."""


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("where", "biased"), [("one score", True), ("one score", False), ("all scores", False), ("the bias", True)]
)
@pytest.mark.parametrize("route", [kernels.route, invariant.route])
def test_a_row_with_a_score_that_is_no_number_weighs_its_experts_with_none(
    rule: RouteRule, biased: bool, where: str, route: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    x, weight = noise(ROWS, WIDTH), noise(EXPERTS, WIDTH, seed=2)
    bias = noise(EXPERTS, seed=3) if biased else None
    sound_ids, sound = route(x, weight, bias, rule)
    broken = torch.arange(ROWS) == 1
    if where == "all scores":
        x[1, 3] = math.nan
    elif where == "one score":
        weight[7, 5], broken = math.nan, torch.ones(ROWS, dtype=torch.bool)
    elif bias is not None:
        bias[7], broken = math.nan, torch.ones(ROWS, dtype=torch.bool)
    ids, weights = route(x, weight, bias, rule)
    assert bool(((ids >= 0) & (ids < EXPERTS)).all()), "an expert that is none would be read from beyond the matrices"
    assert bool(weights[broken].isnan().all())
    assert torch.equal(weights[~broken], sound[~broken]) and torch.equal(ids[~broken], sound_ids[~broken])


def test_rows_that_pad_a_step_choose_nobody_whatever_they_hold() -> None:
    rule = RULES["sigmoid, 4 groups, normalise=True"]
    x, slots = noise(ROWS, WIDTH), torch.tensor([0, -1, 1, -1])
    x[1:3] = math.nan
    normed, total = torch.empty(2, ROWS, WIDTH)
    given = torch.zeros(ROWS, WIDTH), torch.ones(WIDTH), 1e-6, noise(EXPERTS, WIDTH, seed=2), None, rule, slots
    ids, weights = kernels.add_norm_route(x, *given, normed, total)
    assert bool((ids[[1, 3]] == EXPERTS).all()) and bool((weights[[1, 3]] == 0).all())
    assert bool(weights[2].isnan().all()) and bool(weights[0].isfinite().all())


@pytest.mark.parametrize("run", [kernels.experts_few, kernels.experts_grouped])
def test_a_row_whose_weights_are_no_numbers_comes_to_none(run: Callable[..., None]) -> None:
    ids, weights = torch.tensor([[0, 2], [0, 0], [1, 2]]), torch.ones(3, 2)
    weights[1] = math.nan
    out = torch.zeros(3, WIDTH)
    gate_up, down = noise(EXPERTS, 2 * WIDTH, WIDTH), noise(EXPERTS, WIDTH, WIDTH)
    run(noise(3, WIDTH), gate_up, down, ids, weights, None, Workspace(), out)
    assert bool(out[1].isnan().all()) and bool(out[[0, 2]].isfinite().all())


PAGE, HEADS, GROUPS, RANK, ROPE, NEW = 16, 4, 2, 32, 16, 3
LATENT, HEAD = latent_row(RANK, ROPE), heads_row(GROUPS, RANK)
Attends = Callable[[Tensor, Tensor], Tensor]


def latent_rows(pool: Tensor, _: Tensor) -> Tensor:
    kind, size = (torch.bfloat16, 1) if pool.dtype == torch.uint8 else (torch.float32, 4)
    out = torch.zeros(2 * NEW, HEADS, RANK, dtype=kind)
    step = attention.prepare(*fork(2, NEW), backend.shape_of(HEADS, RANK, ROPE, PAGE, CPU, size), CPU)
    attention.mla_rows(noise(2 * NEW, HEADS, RANK + ROPE).to(kind), pool, step, 0.2, Workspace(), out)
    return out


def latent_extend(pool: Tensor, _: Tensor) -> Tensor:
    out, step = torch.zeros(2 * NEW, HEADS, 24), extend.prepare_extend(*fork(2, NEW), PAGE, HEADS, CPU)
    up = noise(HEADS, RANK, 8), noise(HEADS, 24, RANK)
    extend.mla_extend(noise(2 * NEW, HEADS, 8 + ROPE), pool, *up, step, 0.2, Workspace(), out)
    return out


def grouped_rows(keys: Tensor, values: Tensor) -> Tensor:
    kind, size = (torch.bfloat16, 1) if keys.dtype == torch.uint8 else (torch.float32, 4)
    out = torch.zeros(2 * NEW, HEADS, RANK, dtype=kind)
    step = attention.prepare(*fork(2, NEW), backend.grouped_shape_of(HEADS, GROUPS, RANK, PAGE, CPU, size), CPU)
    grouped.gqa_rows(noise(2 * NEW, HEADS, RANK).to(kind), keys, values, step, 0.2, Workspace(), out)
    return out


def grouped_extend(keys: Tensor, values: Tensor) -> Tensor:
    out, step = torch.zeros(2 * NEW, HEADS, RANK), extend.prepare_extend(*fork(2, NEW), PAGE, HEADS, CPU)
    grouped.gqa_extend(noise(2 * NEW, HEADS, RANK), keys, values, step, 0.2, Workspace(), out)
    return out


@pytest.mark.parametrize(
    ("attends", "row", "pool"),
    [
        (latent_rows, None, 0), (latent_rows, LATENT, 0), (latent_extend, None, 0),
        *product((grouped_rows, grouped_extend), (None,), (0, 1)), *product((grouped_rows,), (HEAD,), (0, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("page", [1, 11], ids=["trunk", "tail"])
def test_attention_to_a_number_that_is_none_is_none(
    attends: Attends, row: CacheRow | None, pool: int, page: int
) -> None:
    """The trunk's page is seen by both branches, a tail's page by its own alone."""
    width = LATENT.numbers if attends in (latent_rows, latent_extend) else GROUPS * RANK
    pools = [noise(40, PAGE, width, seed=seed) for seed in (4, 5)]
    pools[pool][page, 2, 3] = math.nan
    out = attends(*(pools if row is None else [row.coded(one) for one in pools]))
    heads = out[:, : HEADS // GROUPS] if width == GROUPS * RANK else out  # the others read another head
    if pool:  # values that are none are so in their own column alone, where each number has a scale of its own
        heads = heads[..., 3:4]
    none = heads.isnan().flatten(1).all(1)
    assert none.tolist() == [page == 1] * NEW + [True] * NEW
