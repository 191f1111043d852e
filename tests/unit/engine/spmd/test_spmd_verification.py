"""Plans are right for every family, and a plan that was tampered with is seen, by its legality and by its result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentspeed_engine.models.boundaries import outline
from agentspeed_engine.models.catalog import load, read_source
from agentspeed_engine.models.mesh_choice import Weights, cheaper_exchange, choose_mesh
from agentspeed_engine.models.planning import plan_model
from agentspeed_engine.models.registry import BY_TYPE
from agentspeed_engine.spmd.experts import ExpertSpread, copies_of, deal, share_of_rows
from agentspeed_engine.spmd.legality import check_plan
from agentspeed_engine.spmd.machine import MACHINES
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.plan import Call, Collective, Plan, PlanError, SumCall, plan
from agentspeed_engine.spmd.spec import EVERYWHERE, TOKEN_SHARD
from tests.conformance.family_configs import ARCHITECTURE, random_config
from tests.support.logical_ranks import PAGE, LogicalRanks, assert_equal_to_one
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

IDS = np.random.default_rng(8).integers(0, 300, 200).tolist()
SENT = ExpertSpread(exchange="all_to_all")
V3 = Path(__file__).parents[4] / "bench/models/deepseek-v3.json"
PLANNED = [name for name, family in BY_TYPE.items() if "index_select" not in family.ops and name in ARCHITECTURE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(CONFIG, tmp_path_factory.mktemp("model"), seed=9, dtype="float64")


def divisible(name: str) -> dict[str, Any]:
    """A random configuration that two by two ranks divide."""
    config = random_config(name, 1)
    text = config.get("text_config", config)
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4 if "kv_lora_rank" in text else 2}
    if "num_experts" in text:
        text |= {"num_experts": 8}
    if "n_routed_experts" in text:
        text |= {"first_k_dense_replace": 1} if "mlp_layer_types" not in text else {}
    return config


@pytest.mark.parametrize(
    "mesh", [Mesh(tp=2), Mesh(dp=2, tp=2), Mesh(dp=2, tp=2, experts=SENT)], ids=["tp", "both", "sent"]
)
@pytest.mark.parametrize("name", PLANNED)
def test_every_family_gives_over_ranks_what_it_gives_alone(tmp_path: Path, name: str, mesh: Mesh) -> None:
    assert_equal_to_one(make_checkpoint(divisible(name), tmp_path, seed=1, dtype="float64"), mesh,
                        [[IDS[:5], IDS[9:12]][: mesh.dp], [[7], []][: mesh.dp]])  # fmt: skip


@pytest.mark.parametrize("mesh", [Mesh(dp=2, tp=2), Mesh(dp=2, tp=2, experts=SENT)], ids=["both", "sent"])
@pytest.mark.parametrize("name", PLANNED)
def test_what_a_model_declares_without_its_modules_is_what_they_declare(tmp_path: Path, name: str, mesh: Mesh) -> None:
    made = make_checkpoint(divisible(name), tmp_path, seed=1, dtype="float64")
    source = read_source(made)
    chain = LogicalRanks(made, mesh).chains[0]
    assert outline(source.config, mesh) == [module.boundary for module in chain]
    planned = plan_model(source, mesh, dtype="bfloat16", rows=4)
    assert Weights(source).bytes(mesh, "bfloat16") == planned.weight_bytes


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([(2, 1), (3, 1), (2, 2), (4, 1), (3, 2)]),
    st.sampled_from(["sum", "all_to_all"]),
    st.integers(0, 2),
    st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=2),
    st.booleans(),
)
def test_any_spread_of_experts_over_any_rows_changes_nothing(
    folder: Path, size: tuple[int, int], exchange: Any, more: int, counts: list[list[int]], loaded: bool
) -> None:
    """Uneven, and with ranks or whole steps without rows."""
    dp, tp = size
    spare = -8 % (dp * tp) + more * dp * tp
    loads = (5.0, 1.0, 1.0, 3.0, 1.0, 1.0, 0.0, 1.0) if loaded else ()
    spread = ExpertSpread(exchange=exchange, spare=min(spare, 8 * (dp * tp - 1)), loads=loads)
    steps = [[IDS[10 * rank : 10 * rank + count] for rank, count in enumerate(one[:dp])] for one in counts]
    assert_equal_to_one(folder, Mesh(dp=dp, tp=tp, experts=spread), steps)


# ---- tampering ----------------------------------------------------------------------------------------------------
MUTANTS = ("removed", "doubled", "other kind", "other axis")


def mutated(made: Plan, at: int, how: str) -> Plan:
    """The plan with one of its collectives tampered with; fused ones are taken apart."""
    steps = [part for step in made.steps for part in _parts(step)]
    places = [index for index, step in enumerate(steps) if isinstance(step, Collective)]
    place = places[at % len(places)]
    step = steps[place]
    assert isinstance(step, Collective)
    kinds = {"all_reduce": "all_gather", "all_gather": "all_reduce", "reduce_scatter": "all_reduce",
             "dispatch": "all_gather", "combine": "all_reduce"}  # fmt: skip
    changed: dict[str, list[Any]] = {
        "removed": [],
        "doubled": [step, step],
        "other kind": [replace(step, kind=kinds[step.kind])],  # type: ignore[arg-type]
        "other axis": [replace(step, axis="dp" if step.axis == "tp" else "tp")],
    }
    return Plan(mesh=made.mesh, steps=(*steps[:place], *changed[how], *steps[place + 1 :]))


def _parts(step: Any) -> list[Any]:
    return [step.reduce, Call(module=step.module)] if isinstance(step, SumCall) else [step]


@pytest.mark.parametrize("how", MUTANTS)
@pytest.mark.parametrize("spread", [ExpertSpread(), SENT], ids=["sum", "sent"])
def test_a_plan_that_was_tampered_with_is_illegal_and_gives_other_logits(
    folder: Path, spread: ExpertSpread, how: str
) -> None:
    mesh = Mesh(dp=2, tp=2, experts=spread)
    steps = [IDS[:5], IDS[20:23]]
    alone = load(folder, dtype="float64", pages=64, page_tokens=PAGE)
    wanted = torch.cat([alone.forward(batch(PAGE, [(Trail(PAGE, list(range(30 * i, 30 * i + 30))), ids)]))
                        for i, ids in enumerate(steps)])  # fmt: skip
    ranks = LogicalRanks(folder, mesh)
    sound, declared = ranks.plan, [module.boundary for module in ranks.chains[0]]
    check_plan(sound, declared, start=TOKEN_SHARD, finish=EVERYWHERE)
    for at in range(len(sound.collectives)):
        ranks.plan = mutated(sound, at, how)
        with pytest.raises(PlanError):
            check_plan(ranks.plan, declared, start=TOKEN_SHARD, finish=EVERYWHERE)
        try:
            got = ranks.forward([batch(PAGE, [(Trail(PAGE, list(range(3, 31))), ids)]) for ids in steps])
        except (RuntimeError, AttributeError, TypeError, ValueError, IndexError):
            continue  # shapes or values that no longer fit
        assert any(piece.shape != wanted.shape or not torch.allclose(piece, wanted, rtol=0, atol=1e-9) for piece in got)


def test_a_module_left_out_of_a_plan_or_called_twice_is_seen() -> None:
    chain = outline(read_source(f"random:{V3}").config, Mesh(tp=2))[-2:]
    made = plan(chain, Mesh(tp=2), start=TOKEN_SHARD, finish=TOKEN_SHARD)
    for steps in (made.steps[1:], (made.steps[0], *made.steps)):
        with pytest.raises(PlanError, match=r"is called where|never called"):
            check_plan(Plan(mesh=made.mesh, steps=steps), chain, start=TOKEN_SHARD, finish=TOKEN_SHARD)


# ---- by hand ------------------------------------------------------------------------------------------------------
def test_v3_sends_a_row_to_four_in_ten_ranks_of_sixteen_and_takes_one_sum_back() -> None:
    """8 of 256 experts, 16 on a rank: a rank is missed by C(240, 8) / C(256, 8) of the rows."""
    missed = 1.0
    for drawn in range(8):
        missed *= (240 - drawn) / (256 - drawn)
    assert share_of_rows(256, 8, 16) == pytest.approx(1 - missed) and round(1 - missed, 2) == 0.41
    found = plan_model(read_source(f"random:{V3}"), Mesh(dp=16, experts=SENT), dtype="bfloat16", rows=512)
    sent, back = found.collectives[:2]
    assert [line.kind for line in found.collectives] == ["dispatch", "combine"] * 58
    assert (sent.launches, back.launches, found.launches) == (2, 1, 3 * 58)
    assert sent.bytes_sent == pytest.approx(512 * 15 * (1 - missed) * (7168 * 2 + 8 * 8), rel=1e-3)
    assert back.bytes_sent == pytest.approx(512 * 15 * (1 - missed) * 7168 * 2, rel=1e-3)


def test_rows_are_sent_when_there_are_many_and_summed_when_there_are_few() -> None:
    source, mesh = read_source(f"random:{V3}"), Mesh(dp=16)
    ways = [cheaper_exchange(source, mesh, MACHINES["h200"], dtype="bfloat16", rows=rows) for rows in (1, 512)]
    assert ways == ["sum", "all_to_all"]


def test_a_machine_is_given_the_mesh_that_answers_most_and_told_why_others_cannot_be() -> None:
    source = read_source(f"random:{V3}")
    wide = choose_mesh(source, replace(MACHINES["h200"], gpus=16), dtype="bfloat16", context=32768, sessions=64)
    rates = [one.tokens_per_second for one in wide.candidates if not one.refused]
    assert wide.best is wide.candidates[0] and rates == sorted(rates, reverse=True)
    narrow = choose_mesh(source, MACHINES["h100"], dtype="bfloat16", context=8192, sessions=4)
    assert narrow.best is None
    assert all("no session of 8192 tokens fits beside weights of" in one.refused for one in narrow.candidates)


def test_spare_copies_go_to_the_experts_with_most_load_and_balance_the_groups() -> None:
    loads = (8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    dealt = deal(8, 4, 4, loads)
    copies = [len(places) for places in copies_of(dealt, 8)]
    assert copies[0] == 4 and sum(copies) == 12 and min(copies) == 1
    assert all(len(set(own)) == len(own) == 3 for own in dealt), "no group has two of one"
    assert deal(8, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))
