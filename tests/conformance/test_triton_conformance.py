"""The Triton kernels' numbers without a GPU: through Triton's interpreter, against the definitions, on hostile inputs.

Fewer rows than for the CPU's kernels: the interpreter takes milliseconds a program. `-m slow` runs the rest.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.testing.tolerance import tolerance
from agentspeed_kernels.triton import attention, backend, extend, sampling, specs
from agentspeed_kernels.triton.plan import Cut
from agentspeed_kernels.workspace import Workspace
from tests.support.forked_pieces import fork
from tests.support.sampled_rows import disagreements, sampling_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
"""The interpreter computes both sides of a `where`."""
QUICK = 3
"""Rows of the quick cases."""
QUICK_OF = {
    "experts": (1, 6),
    "experts_and_shared": (1, 6),
    "route": (3,),
    "add_norm_route": (3,),
    "mla_extend": (3,),
    "mla_rows": (1, 3),
    "qkv_append": (3,),
    "gqa_rows": (1, 3),
    "gqa_extend": (3,),
}
"""Ops whose programs are many: fewer cases. More than four tokens take the grouped form of `experts`."""


def names(spec: KernelSpec) -> str:
    return f"{spec.op} {spec.name}"


def over_tolerance(spec: KernelSpec, cases: list[conformance.Case]) -> dict[str, float]:
    return {
        case.name: error
        for case in cases
        if not (error := conformance.worst_error(spec, case)) <= tolerance(case.op, case.dtype)
    }


@pytest.mark.parametrize("spec", specs.SPECS, ids=names)
def test_a_kernel_keeps_its_tolerance_on_hostile_inputs(spec: KernelSpec) -> None:
    rows = QUICK_OF.get(spec.op, (1, QUICK))
    cases = [case for case in conformance.cases(spec, most=max(rows)) if case.rows in rows and case.size == "small"]
    cases += [case for case in conformance.cases(spec, most=1) if case.size == "odd" and case.manner == "random"]
    if spec.op in QUICK_OF:
        cases = [case for case in cases if case.manner in ("random", "one_peak")]
    assert cases
    assert not over_tolerance(spec, cases)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("spec", specs.SPECS, ids=names)
def test_a_kernel_keeps_its_tolerance_on_every_case(spec: KernelSpec) -> None:
    assert not over_tolerance(spec, list(conformance.cases(spec, most=20)))


def test_attention_that_forgets_the_causal_edge_is_caught() -> None:
    honest = next(spec for spec in specs.SPECS if spec.op == "mla_rows")

    def careless(q, pool, plan, scale, workspace, out) -> None:  # type: ignore[no-untyped-def]
        plan.plan.edge = False
        attention.mla_rows(q, pool, plan, scale, workspace, out)

    case = conformance.Case(op="mla_rows", dtype="float32", manner="random", size="small", rows=3)
    lazy = KernelSpec(
        op="mla_rows", name="lazy", dtypes=honest.dtypes, device="cuda", call=careless, priority=1, plans="triton"
    )
    assert conformance.worst_error(honest, case) <= tolerance("mla_rows", "float32")
    assert conformance.worst_error(lazy, case) > tolerance("mla_rows", "float32")


@pytest.mark.parametrize("cut", ["even", "stream", "fixed", None])
@pytest.mark.parametrize(("heads", "new"), [(4, 1), (6, 3), (20, 1)])
def test_every_cut_gives_the_same_attention(cut: Cut | None, heads: int, new: int) -> None:
    pieces, positions = fork(3, new)
    noise = torch.Generator().manual_seed(1)
    pool = torch.randn(40, 16, 48, generator=noise)
    q = torch.randn(positions.size, heads, 48, generator=noise)
    shape = backend.shape_of(heads, 32, 16, 16, torch.device("cpu"))
    plan = attention.prepare(pieces, positions, shape, torch.device("cpu"), cut=cut)
    out = torch.full((positions.size, heads, 32), float("nan"))
    attention.mla_rows(q, pool, plan, 0.15, Workspace(), out)
    tiles = conformance.plan_tiles(pieces, positions, page_tokens=16, chunk_tokens=32, block_rows=4)
    wanted = conformance.definitions.mla_rows(q, pool, tiles, 0.15, 32)
    assert float((out.double() - wanted).abs().max()) < 1e-5


def test_a_row_is_bit_equal_in_any_batch_under_the_invariant_cut() -> None:
    pieces, positions = fork(3, 1)
    noise = torch.Generator().manual_seed(1)
    pool, q = torch.randn(40, 16, 48, generator=noise), torch.randn(3, 4, 48, generator=noise)
    shape = backend.shape_of(4, 32, 16, 16, torch.device("cpu"))
    together = torch.empty(3, 4, 32)
    plan = attention.prepare(pieces, positions, shape, torch.device("cpu"), cut="fixed")
    attention.mla_rows(q, pool, plan, 0.15, Workspace(), together)
    for row in range(3):
        zero = np.zeros(1, np.int32)
        alone = [
            conformance.piece(one.pages, one.start, one.tokens, zero, one.causal)
            for one in (pieces[0], pieces[row + 1])
        ]
        out = torch.empty(1, 4, 32)
        plan = attention.prepare(alone, positions[row : row + 1], shape, torch.device("cpu"), cut="fixed")
        attention.mla_rows(q[row : row + 1], pool, plan, 0.15, Workspace(), out)
        assert torch.equal(out[0], together[row])


def test_extends_over_several_chunks_equal_extends_over_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, positions = fork(2, 20)
    noise = torch.Generator().manual_seed(1)
    pool, q = torch.randn(40, 16, 48, generator=noise), torch.randn(40, 3, 32, generator=noise)
    key_up, value_up = torch.randn(3, 32, 16, generator=noise), torch.randn(3, 24, 32, generator=noise)
    steps = extend.prepare_extend(pieces, positions, 16, 3, torch.device("cpu"))
    outs = []
    for most in (1 << 30, 1):
        monkeypatch.setattr(extend, "CHUNK_BYTES", most)
        outs.append(torch.full((40, 3, 24), float("nan")))
        extend.mla_extend(q, pool, key_up, value_up, steps, 0.15, Workspace(), outs[-1])
    assert float((outs[0] - outs[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_device_draws_what_the_sampler_on_the_cpu_draws(kind: torch.dtype, penalised: bool) -> None:
    assert disagreements(kind, penalised, vocabulary=701, seed=1) == []


def test_logits_nothing_can_be_drawn_from_are_reported_a_row() -> None:
    logits = torch.zeros(4, 40)
    logits[0, 3], logits[1, 3] = float("nan"), float("inf")
    logits[2, :] = -float("inf")
    forbidden = np.zeros(40, dtype=bool)
    masks = [None, None, None, forbidden]
    rows = sampling_rows([Sampling(temperature=1.0)] * 4, masks, [(1, 2, 3)] * 4, [5] * 4, logits, {})
    assert sampling.sample(logits, rows, Workspace()).faulty.tolist() == [1, 1, 1, 2]
