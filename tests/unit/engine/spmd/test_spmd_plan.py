"""The planner: one transition table, the residual as a second value, prices, and errors that name both modules."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from agentspeed_engine.spmd.placement import FEATURES, TOKENS, Layout, Mesh, Partial, Placement, Replicate, Shard
from agentspeed_engine.spmd.plan import Call, Collective, PlanError, plan
from agentspeed_engine.spmd.spec import EVERYWHERE, Boundary

R, P, ST, SF = Replicate(), Partial(), Shard(TOKENS), Shard(FEATURES)
TABLE = {
    (P, R): ("all_reduce", 0),
    (P, ST): ("reduce_scatter", TOKENS),
    (P, SF): ("reduce_scatter", FEATURES),
    (ST, R): ("all_gather", TOKENS),
    (SF, R): ("all_gather", FEATURES),
    (R, ST): ("slice", TOKENS),
    (R, SF): ("slice", FEATURES),
}


def on_tp(placement: Placement) -> Layout:
    return Layout(dp=R, tp=placement)


def module(name: str, takes: Placement, gives: Placement, residual: Placement | None = None) -> Boundary:
    return Boundary(
        name=name,
        input=on_tp(takes),
        output=on_tp(gives),
        width=8,
        residual=None if residual is None else on_tp(residual),
    )


@pytest.mark.parametrize(("held", "wanted"), list(product((R, P, ST, SF), repeat=2)))
def test_a_transition_is_the_tables_or_refused_naming_both_modules(held: Placement, wanted: Placement) -> None:
    chain = [module("left", R, held), module("right", wanted, R)]
    if held == wanted:
        assert plan(chain, Mesh(tp=2), start=EVERYWHERE, finish=EVERYWHERE).collectives == ()
    elif (held, wanted) in TABLE:
        (found,) = plan(chain, Mesh(tp=2), start=EVERYWHERE, finish=EVERYWHERE).collectives
        assert (found.kind, found.dim) == TABLE[held, wanted]
        assert found.between == ("left", "right")
    else:
        with pytest.raises(PlanError, match=r"left gives .* along tp and right takes"):
            plan(chain, Mesh(tp=2), start=EVERYWHERE, finish=EVERYWHERE)


def test_a_mesh_of_one_has_no_collectives_whatever_is_declared() -> None:
    chain = [module("a", R, P), module("b", ST, SF, residual=R), module("c", P, SF, residual=ST)]
    made = plan(chain, Mesh(), start=EVERYWHERE, finish=EVERYWHERE)
    assert made.steps == (Call(module=0), Call(module=1), Call(module=2))
    assert made.price(tokens=1000, item_bytes=4) == (0, 0)


def test_the_residual_is_moved_by_itself_where_a_module_needs_it_otherwise() -> None:
    chain = [module("norm", R, R, residual=R), module("mlp", R, P), module("sharded norm", ST, ST, residual=ST)]
    found = plan(chain, Mesh(tp=2), start=EVERYWHERE, finish=on_tp(ST)).collectives
    assert [(step.kind, step.value) for step in found] == [("reduce_scatter", "x"), ("slice", "residual")]


def test_transitions_are_priced_in_bytes_each_rank_sends_and_launches() -> None:
    chain = [module("attention", R, P), module("norm", R, R)]
    made = plan(chain, Mesh(tp=4), start=EVERYWHERE, finish=EVERYWHERE)
    assert made.price(tokens=10, item_bytes=2) == (2 * 3 * (10 * 8 * 2) // 4, 1)
    scattered = plan([module("a", R, P), module("b", ST, ST)], Mesh(tp=4), start=EVERYWHERE, finish=on_tp(ST))
    assert scattered.price(10, 2) == made.price(10, 2), "it runs as an all-reduce, whose result is cut"


def test_a_slice_costs_nothing() -> None:
    made = plan([module("a", SF, R)], Mesh(tp=2), start=EVERYWHERE, finish=EVERYWHERE)
    assert made.price(tokens=10, item_bytes=4) == (0, 0)


def test_features_that_do_not_divide_are_refused() -> None:
    chain = [module("a", R, SF), module("b", R, R)]
    with pytest.raises(PlanError, match="8 features between a and b do not divide by 3 tp ranks"):
        plan(chain, Mesh(tp=3), start=EVERYWHERE, finish=EVERYWHERE)


def test_one_dim_is_not_cut_by_both_axes() -> None:
    both = Layout(dp=ST, tp=ST)
    chain = [
        Boundary(name="a", input=EVERYWHERE, output=both, width=8),
        Boundary(name="b", input=EVERYWHERE, output=EVERYWHERE, width=8),
    ]
    with pytest.raises(PlanError, match="both axes cut the same dim"):
        plan(chain, Mesh(dp=2, tp=2), start=EVERYWHERE, finish=EVERYWHERE)


def test_a_plan_reads_as_sentences() -> None:
    step = Collective(kind="all_reduce", axis="tp", value="x", dim=0, width=8, between=("mla", "norm"))
    assert str(step) == "all_reduce(x@tp) between mla and norm"


def test_a_mesh_without_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        Mesh(tp=0)


def test_the_pure_part_imports_no_torch() -> None:
    code = (
        "import sys; from agentspeed_engine.spmd import placement, spec, plan, lower;sys.exit('torch' in sys.modules)"
    )
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"], timeout=60, check=False
    )
    assert done.returncode == 0
