"""The Triton kernels' numbers without a GPU: through Triton's interpreter, against the definitions, on hostile inputs.

Fewer rows than for the CPU's kernels: the interpreter takes milliseconds a program. `-m slow` runs the rest.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.sampler import draw
from agentspeed_engine.exec.sampling_rows import on_device
from agentspeed_engine.exec.step_input import Sample
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.testing.tolerance import tolerance
from agentspeed_kernels.triton import attention, backend, extend, sampling, specs
from agentspeed_kernels.triton.plan import Cut
from agentspeed_kernels.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
"""The interpreter computes both sides of a `where`."""
QUICK = 3
"""Rows of the quick cases."""
QUICK_OF = {"experts": (1, 6), "route": (3,), "mla_extend": (3,), "mla_rows": (1, 3)}
"""Ops whose programs are many: fewer cases. More than four tokens take the grouped form of `experts`."""


def names(spec: KernelSpec) -> str:
    return spec.op


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


def fork(branches: int, new: int) -> tuple[list[conformance.Piece], np.ndarray]:
    """Branches with `new` tokens each below one trunk, and tails of their own lengths."""
    rows = np.arange(branches * new, dtype=np.int32)
    trunk = conformance.piece(np.array([7, 3, 1, 30], np.int32), 0, 64, rows, False)
    pieces, positions = [trunk], []
    for i in range(branches):
        own = new + 5 * i
        pages = np.array([8 + 3 * i, 9 + 3 * i, 10 + 3 * i], np.int32)
        pieces.append(conformance.piece(pages, 64, own, rows[i * new : (i + 1) * new], True))
        positions += range(64 + own - new, 64 + own)
    return pieces, np.array(positions, np.int64)


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


RULES = (
    Sampling(temperature=0.0, logprobs=3),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=50, logprobs=0),
    Sampling(temperature=1.3, top_p=0.9, logprobs=5),
    Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, logprobs=20),
    Sampling(temperature=2.0, top_k=1),
    Sampling(temperature=1e-3),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, top_k=7000, top_p=0.999, logprobs=2),
)


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_device_draws_what_the_sampler_on_the_cpu_draws(kind: torch.dtype, penalised: bool) -> None:
    rng = np.random.default_rng(1)
    vocabulary, count = 701, len(RULES)
    logits = torch.from_numpy(rng.normal(size=(count, vocabulary)) * 3).to(kind)
    logits[3, :] = 0.0
    logits[3, ::2] = -0.0
    logits[4, 10:] = -float("inf")
    logits[5, 7] = 60.0
    masks = [None if i % 3 else rng.random(vocabulary) < 0.3 for i in range(count)]
    keys = [(random.Random(i).getrandbits(63), i, 3 * i) for i in range(count)]
    positions = [100 + i for i in range(count)]
    adjustments = {i: adjustment(rng, vocabulary) for i in range(0, count, 2)} if penalised else {}
    rows = sampling_rows(RULES, masks, keys, positions, logits, adjustments)
    got = sampling.sample(logits, rows, Workspace())
    for i, rule in enumerate(RULES):
        wanted = draw(logits[i].float().numpy(), rule, keys[i], positions[i], masks[i], adjustments.get(i))
        assert got.ids[i].item() == wanted.id
        if wanted.logprob is not None:
            assert got.logprob[i].item() == pytest.approx(wanted.logprob, abs=1e-9)
            assert got.draw_logprob[i].item() == pytest.approx(wanted.draw_logprob, abs=1e-9)
            found = got.top_ids[i, : len(wanted.top)].tolist()
            assert found == [number for number, _ in wanted.top]
            assert np.allclose(got.top_logprobs[i, : len(found)].numpy(), [value for _, value in wanted.top])
    assert got.faulty.tolist() == [0] * count


def test_logits_nothing_can_be_drawn_from_are_reported_a_row() -> None:
    logits = torch.zeros(4, 40)
    logits[0, 3], logits[1, 3] = float("nan"), float("inf")
    logits[2, :] = -float("inf")
    forbidden = np.zeros(40, dtype=bool)
    masks = [None, None, None, forbidden]
    rows = sampling_rows([Sampling(temperature=1.0)] * 4, masks, [(1, 2, 3)] * 4, [5] * 4, logits, {})
    assert sampling.sample(logits, rows, Workspace()).faulty.tolist() == [1, 1, 1, 2]


def adjustment(rng: np.random.Generator, vocabulary: int) -> Adjustment:
    ids = np.flatnonzero(rng.random(vocabulary) < 0.2)
    scale = np.where(rng.random(len(ids)) < 0.5, 1.7, 1.0).astype(np.float32)
    return Adjustment(ids, scale, (rng.normal(size=len(ids)) * 5).astype(np.float32))


def sampling_rows(
    rules: Sequence[Sampling],
    masks: Sequence[np.ndarray | None],
    keys: Sequence[tuple[int, int, int]],
    positions: Sequence[int],
    logits: torch.Tensor,
    adjustments: Mapping[int, Adjustment],
) -> sampling.SamplingRows:
    """As the engine makes them."""
    samples = [
        Sample(TurnSpec(turn=i, branch=BranchId(i), sampling=rule, draw_key=key, stop_strings=(), grammar=None,
                        consumed_ids=(), prompt_tokens=0), position)
        for i, (rule, key, position) in enumerate(zip(rules, keys, positions, strict=True))
    ]  # fmt: skip
    return on_device(samples, {i: mask for i, mask in enumerate(masks) if mask is not None}, adjustments, logits)
