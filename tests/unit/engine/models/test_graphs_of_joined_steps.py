"""Graphs are made of joined steps only where these give what the modules give; an engine outlives those that do not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from agentspeed_engine.models import graphs as graphs_module
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.families.deepseek.shapes import JOINED_OPS
from agentspeed_engine.models.graphs import Graphs
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.joined_check import objection
from agentspeed_engine.models.kernel_choices import kernel_choices
from agentspeed_engine.models.kv_layout import KvLayout, KvPool
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.spmd.lower import Compiled
from agentspeed_kernels.cpu.torch_kernels import latent_append
from agentspeed_kernels.triton import padded as padded_module
from agentspeed_kernels.triton.backend import TritonAttention, shape_of
from tests.conformance.family_configs import random_config
from tests.support.paged import Trail, batch
from tests.support.recorder import CallsAgain

WIDTH, VOCABULARY, PAGE, PAGES = 8, 50, 16, 16
CONTEXT = 200
CPU = torch.device("cpu")


class Toy:
    """A model of a table and a head: a token's row of the cache is its embedding, and its logits are that times the
    head."""

    def __init__(self) -> None:
        noise = torch.Generator().manual_seed(0)
        self.table, self.head = (torch.randn(VOCABULARY, WIDTH, generator=noise) for _ in range(2))
        pool = KvPool(name="rows", layers=2, width=WIDTH, dtype="float32")
        self.pools = KvPools(KvLayout(pools=(pool,)), PAGES, PAGE)

    def logits(self, ids: Tensor, slots: Tensor, manner: str = "as it is") -> Tensor:
        x, live = self.table[ids], slots >= 0
        if manner == "raises":
            raise RuntimeError("out of resource: shared memory")
        if manner == "no room":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        if manner != "writes no rows":
            self.pools["rows"].flatten(1, 2)[:, slots[live]] = x[live]
        out = x @ self.head.T
        if manner == "rounds elsewhere":
            out *= 1.0001
        elif manner == "other logits":
            out += 2 * self.head.sum(1)
        elif manner == "one row of another" and len(out) > 1:
            out[-1] *= -1
        elif manner == "no number":
            out[0, 3] = float("nan")
        return out

    def chain(self, manner: str = "as it is") -> Sequence[Compiled]:
        def step(x: Tensor, residual: Tensor, state: Any, _: Sequence[int]) -> tuple[Tensor, Tensor]:
            return self.logits(x, state.slots, manner)[state.select], residual

        return [step]

    def modules(self, given: FlatBatch) -> Tensor:
        return self.logits(torch.from_numpy(given.ids), torch.from_numpy(given.slots))[torch.from_numpy(given.select)]

    def graphs(
        self,
        joined: str | None,
        plain: str = "as it is",
        agree: Callable[[bool], bool] | None = None,
        **thresholds: int,
    ) -> Graphs:
        """`thresholds`: of the attention's backend."""
        attention = TritonAttention(shape=shape_of(4, 16, 16, PAGE, CPU, 4), device=CPU, **thresholds)
        rope = cast(Any, SimpleNamespace(at=lambda positions: (positions, positions)))
        chain = None if joined is None else self.chain(joined)
        return Graphs(
            chain, self.chain(plain), self.modules, self.pools, VOCABULARY, rope, attention, CPU,
            recorder=CallsAgain(), agree=agree,
        )  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setattr(graphs_module, "BUCKETS", (1, 4))
    return Toy()


def captured(graphs: Graphs) -> list[int]:
    counts: list[int] = []
    assert graphs.capture(CONTEXT, PAGES * PAGE, 64, counts.append)
    return counts


def next_step() -> FlatBatch:
    return batch(PAGE, [(Trail(PAGE, [row]), [5 + row]) for row in range(3)])


def from_a_graph(graphs: Graphs) -> Tensor:
    """Of a step whose shape may have to be met some times."""
    return next(found for _ in range(5) if (found := graphs.run(next_step(), None)) is not None)


@pytest.fixture
def many(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """With graphs for more rows than give logits."""
    monkeypatch.setattr(graphs_module, "BUCKETS", (4, 12))
    monkeypatch.setattr(graphs_module, "DRAWN", 4)
    monkeypatch.setattr(padded_module, "MANY_QUERIES", 4)
    return toy


def mixed_step(at: int = 0, extended: int = 7) -> FlatBatch:
    """A branch of `at` tokens is fed more beside two that decode; all three draw."""
    long = Trail(PAGE, [4, 5, 6, 7], known=at)
    rows: list[tuple[Trail, list[int]]] = [(Trail(PAGE, [row]), [5 + row]) for row in range(2)]
    return batch(PAGE, [*rows, (long, list(range(9, 9 + extended)))], "last")


@pytest.mark.parametrize("joined", ["rounds elsewhere", None])
def test_a_step_that_extends_a_branch_is_one_graph_and_gives_logits_of_the_rows_that_draw(
    many: Toy, joined: str | None
) -> None:
    graphs = many.graphs(joined)
    captured(graphs)
    before = graphs.count
    for at, extended in ((0, 7), (20, 9), (3, 10)):
        step = mixed_step(at, extended)
        found = next(found for _ in range(5) if (found := graphs.run(step, None)) is not None)
        assert found.shape == (3, VOCABULARY) and torch.allclose(found, many.modules(step), rtol=1e-3)
    assert graphs.count <= before + 1, "steps of as many rows share a graph"
    assert graphs.run(mixed_step(0, 11), None) is None, "it has more rows than any graph"


def test_a_step_outlives_a_graph_of_it_that_has_no_room(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    graphs = toy.graphs("no room")
    assert [graphs.run(next_step(), None) for _ in range(5)] == [None] * 5
    assert graphs.joins and graphs.count == 0, "nothing is wrong with its chain"
    (said,) = caplog.messages
    assert said == "no more graphs than 0: there is no room for one of up to 4 rows: CUDA out of memory"


def test_ranks_of_which_one_has_no_room_capture_no_more_and_ask_no_more(toy: Toy) -> None:
    asked: list[bool] = []

    def agree(mine: bool) -> bool:
        asked.append(mine)
        return False

    graphs = toy.graphs("as it is", agree=agree)
    assert [graphs.run(next_step(), None) for _ in range(6)] == [None] * 6
    assert asked == [True] and graphs.count == 0


def test_ranks_of_which_one_finds_joined_steps_wrong_all_leave_them_out(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([True, False])  # room, and what the first capture came to
    graphs = toy.graphs("as it is", agree=lambda mine: mine and next(answers, True))
    assert torch.allclose(from_a_graph(graphs), toy.modules(next_step())) and not graphs.joins
    assert "another rank found it wanting" in caplog.text


def test_a_rank_without_memory_for_a_graph_is_named_for_others_wait_for_it_in_the_step(toy: Toy) -> None:
    graphs = toy.graphs("no room", agree=lambda mine: mine)
    with pytest.raises(torch.OutOfMemoryError):
        from_a_graph(graphs)


def test_steps_that_draw_nothing_check_no_logits_and_so_find_no_form_sound(toy: Toy) -> None:
    graphs = toy.graphs("other logits")
    chunk = replace(next_step(), select=np.zeros(0, np.int64))
    for _ in range(5):
        graphs.run(chunk, None)
    step = next_step()
    assert torch.allclose(from_a_graph(graphs), toy.modules(step)) and not graphs.joins
    assert any(graphs.run(chunk, None) is not None for _ in range(5)), "where nothing is to be checked they are graphs"


def test_a_step_whose_long_extend_would_cost_much_as_rows_is_no_graph(many: Toy) -> None:
    graphs = many.graphs("as it is", extend_from=6, absorbed=4 * 7 * 30)
    assert [graphs.run(mixed_step(40), None) for _ in range(5)] == [None] * 5
    assert any(graphs.run(mixed_step(20), None) is not None for _ in range(5))


def test_joined_steps_that_round_elsewhere_are_what_graphs_are_made_of(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = toy.graphs("rounds elsewhere")
    counts = captured(graphs)
    assert graphs.joins and graphs.count == counts[-1] >= 2
    assert not any(record.levelname == "WARNING" for record in caplog.records)
    assert not toy.pools["rows"].any(), "what the check wrote is left in the cache"
    assert torch.allclose(from_a_graph(graphs), 1.0001 * toy.modules(next_step()), atol=1e-5)


WRONG = {
    "other logits": "its logits lie .* apart in the median row, and 0.001 is the most",
    "one row of another": "its logits lie 2 apart in one row, and 0.5 is the most",
    "no number": "its logits are not finite",
    "writes no rows": "its rows of the cache lie .* apart",
    "raises": "it raised RuntimeError: out of resource: shared memory",
}


@pytest.mark.parametrize("manner", WRONG)
def test_joined_steps_that_are_wrong_are_left_out_with_one_warning_and_graphs_are_of_the_modules(
    manner: str, toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = toy.graphs(manner)
    captured(graphs)
    assert not graphs.joins and graphs.count >= 2
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "joined steps are left out" in warning and "AGENTSPEED_KERNELS=-joined" in warning
    assert re.search(WRONG[manner], warning)
    assert not toy.pools["rows"].any()
    assert torch.allclose(from_a_graph(graphs), toy.modules(next_step()), atol=1e-5)


def test_a_form_that_no_usual_step_has_is_checked_when_its_first_graph_is_captured(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = toy.graphs("other logits")
    found = [graphs.run(next_step(), None) for _ in range(4)]
    assert found[:3] == [None, None, None] and not graphs.joins
    assert "joined steps are left out, found by one of up to 4 rows" in caplog.text
    assert found[3] is not None and torch.allclose(found[3], toy.modules(next_step()), atol=1e-5)


def test_steps_that_nobody_wants_joined_are_of_the_modules_without_a_check(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = toy.graphs(None)
    captured(graphs)
    assert not graphs.joins and graphs.count >= 2 and not caplog.records
    assert torch.allclose(from_a_graph(graphs), toy.modules(next_step()), atol=1e-5)


def test_one_row_may_meet_a_near_tie_and_rows_without_numbers_say_nothing() -> None:
    wanted = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    got = wanted.clone()
    got[3] += 0.3 * wanted[3].roll(1)
    assert objection("logits", got, wanted) is None
    got[:4] += 0.01 * wanted[:4].roll(1)
    got[4] += 0.01
    assert "in the median row" in str(objection("logits", got, wanted))
    wanted[:] = float("nan")
    assert objection("logits", got, wanted) is None


def test_a_user_excludes_the_ops_that_join_others_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(random_config("deepseek_v2", 0)))
    source = read_source(f"random:{tmp_path / 'config.json'}")
    for asked, there in (("", set(JOINED_OPS)), ("-joined", set())):
        monkeypatch.setenv("AGENTSPEED_KERNELS", asked)
        found = kernel_choices(source, platform="cuda:90", dtype="float32", weights=None)
        assert set(found.ops) & set(JOINED_OPS) == there


def test_an_engine_whose_steps_cannot_be_captured_at_all_launches_them_kernel_by_kernel(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = toy.graphs("raises", plain="raises")
    captured(graphs)
    assert graphs.count == 0 and [graphs.run(next_step(), None) for _ in range(5)] == [None] * 5
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2 and warnings[1].startswith("steps are not captured")
    assert "it raised RuntimeError: out of resource" in warnings[1]


@pytest.mark.parametrize("slots", [[-1, 5, -1, 2], [3, -1, -1, 0], [-1, -1, -1, -1]])
def test_a_token_without_a_slot_is_written_nowhere_by_torch_either(slots: list[int]) -> None:
    noise = torch.Generator().manual_seed(0)
    raw, pool, gain = torch.randn(4, 12, generator=noise), torch.randn(8, 12, generator=noise), torch.ones(8)
    cos = sin = torch.full((4, 2), 0.5**0.5)
    after, live = pool.clone(), [row for row, slot in enumerate(slots) if slot >= 0]
    for row in live:
        latent_append(raw[[row]], gain, 1e-6, cos[:1], sin[:1], torch.tensor([slots[row]]), after)
    latent_append(raw, gain, 1e-6, cos, sin, torch.tensor(slots), pool)
    assert torch.allclose(pool, after)
