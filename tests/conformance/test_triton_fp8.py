"""Weights in fp8 blocks on a GPU, through the interpreter: a model's logits, every form of a product, odd blocks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_engine.models.catalog import load, read_source
from agentspeed_engine.models.joined import joined
from agentspeed_engine.models.kv_pools import TORCH_DTYPES, KvPools
from agentspeed_engine.models.loaded import step_state, weight_source
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.source import ModelSource
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.spmd.lower import run
from agentspeed_engine.spmd.placement import ONE
from agentspeed_kernels.fp8_blocks import Fp8Blocks, in_blocks
from agentspeed_kernels.platform import named
from agentspeed_kernels.reference import definitions
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.triton import fp8_kernels
from agentspeed_kernels.triton.backend import TritonAttention, shape_of
from agentspeed_kernels.workspace import Workspace
from tests.support.decoded_logits import apart, decoded_logits
from tests.support.fp8_checkpoint import make_fp8_checkpoint
from tests.support.paged import CONFIG, Trail, batch

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
"""The interpreter computes both sides of a `where`."""

PAGE, CPU = 64, torch.device("cpu")
MODEL: dict[str, Any] = CONFIG | {
    "hidden_size": 136, "intermediate_size": 136, "moe_intermediate_size": 136, "num_hidden_layers": 2,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
    "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 32,
}  # fmt: skip
IDS = [7 * i % 300 for i in range(7)]
PROMPT = 5
"""Above the few rows that read weights by themselves."""


def on_a_gpu(source: ModelSource, kept: WeightFormat | None) -> torch.Tensor:
    """Logits in bfloat16 of a prompt by the modules, and of tokens behind it by joined steps."""
    config, family = source.config, source.family
    sizes = {"page_tokens": PAGE, **family.sizes(config, ONE.mesh)}
    pools = KvPools(family.kv_layout(config, "bfloat16", ONE.mesh), 6, PAGE)
    kernels = Kernels(standard(), named("cuda:90"), "bfloat16", family.ops_on("cuda"), sizes=sizes, weights=kept)
    held = weight_source(source, "bfloat16", weights=kept)
    chain = family.build(config, held, pools, ONE, kernels)
    rope = Rope(config.rope, config.context_limit, TORCH_DTYPES["bfloat16"])
    shape = shape_of(sizes["H"], sizes["R"], sizes["rope"], PAGE, CPU)
    attention, trail, parts = TritonAttention(shape=shape, device=CPU), Trail(PAGE, [3, 1]), []
    plain = [lambda x, residual, state, _, module=module: module(x, residual, state) for module in chain]
    steps = [(plain, IDS[:PROMPT]), *((joined(chain), [token]) for token in IDS[PROMPT:])]
    with torch.inference_mode():
        for made, new in steps:
            ids, state = step_state(batch(PAGE, [(trail, new)]), rope, PAGE, Workspace(), attention)
            parts.append(run(made, ids, state, (len(new),)).clone())
    return torch.cat(parts).double()


def test_logits_lose_no_more_than_they_do_with_the_same_weights_in_bfloat16(tmp_path: Path) -> None:
    folder = make_fp8_checkpoint(MODEL, tmp_path, seed=3)
    exact = decoded_logits(load(folder, dtype="float64", pages=6, page_tokens=PAGE, weights="fp8"), IDS, PROMPT, PAGE)
    wide, held = (apart(on_a_gpu(read_source(folder), kept), exact) for kept in (None, "fp8"))
    assert held < 1.3 * wide
    assert held < 0.02


FORMS = {"a row": 1, "few rows": 3, "tiles of 16": 5, "tiles of 64": 40, "widened": 257}


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_every_form_of_a_product_multiplies_with_what_the_bytes_stand_for(rows: int) -> None:
    noise = torch.Generator().manual_seed(1)
    weight = in_blocks(torch.randn(140, 200, generator=noise) * torch.logspace(-9, 9, 200))
    x, bias = torch.randn(rows, 200, generator=noise), torch.randn(140, generator=noise)
    out = torch.full((rows, 150), float("nan"))[:, 5:145]
    fp8_kernels.linear(x, weight, bias, out)
    wanted = definitions.linear(x, weight.whole(torch.float64), bias)
    assert float((out - wanted).abs().max() / wanted.abs().max()) < 1e-6


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_every_byte_is_the_number_that_it_stands_for(rows: int) -> None:
    """All of e4m3 in both signs, the smallest among them, by a scale that has nothing to round."""
    every = torch.arange(256, dtype=torch.uint8)
    every[[0x7F, 0xFF]] = 0  # no numbers
    weight = Fp8Blocks(every.view(torch.float8_e4m3fn).repeat(16, 1), torch.full((1, 2), 2.0**-20))
    x, out = torch.zeros(rows, 256), torch.full((rows, 16), float("nan"))
    numbers = weight.whole(torch.float32)[0]
    for first in range(0, 256, rows):
        some = torch.arange(first, min(first + rows, 256))
        x.zero_()
        x[range(len(some)), some] = 1
        fp8_kernels.linear(x, weight, None, out)
        assert torch.equal(out[: len(some), 3], numbers[some])
        if rows < 40:
            break  # one step says how a form converts; those of few rows would take a hundred more


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_a_block_that_is_no_number_spoils_its_outputs_and_no_others(rows: int) -> None:
    weight = in_blocks(torch.ones(200, 300))
    weight.scales[0, 1] = float("nan")
    out = torch.zeros(rows, 200)
    fp8_kernels.linear(torch.ones(rows, 300), weight, None, out)
    assert not bool(out[:, :128].isfinite().any())
    assert torch.allclose(out[:, 128:], torch.tensor(300.0))


@pytest.mark.parametrize("rows", [1, 6, 260])
def test_experts_of_which_one_is_shared_add_up_in_every_form(rows: int) -> None:
    noise = torch.Generator().manual_seed(1)
    wide = [
        torch.randn(*shape, generator=noise) / 8 for shape in ((3, 280, 64), (3, 64, 140), (1, 300, 64), (1, 64, 150))
    ]
    held = [in_blocks(one, parts) for one, parts in zip(wide, (2, 1, 2, 1), strict=True)]
    meant = [one.whole(torch.float64).reshape(its.shape) for one, its in zip(held, wide, strict=True)]
    x = torch.randn(rows, 64, generator=noise)
    ids, shares = torch.randint(0, 4, (rows, 2), generator=noise), torch.rand(rows, 2, generator=noise)
    shares[ids == 3] = 0  # nobody
    out = torch.full((rows, 64), float("nan"))
    fp8_kernels.experts_and_shared(x, held[0], held[1], ids, shares, held[2], held[3], Workspace(), out)
    everyone = torch.zeros(rows, 1, dtype=torch.int64)
    wanted = definitions.experts(x, meant[2], meant[3], everyone, torch.ones(rows, 1))
    for expert in range(3):
        share = (shares * (ids == expert)).sum(1, keepdim=True)
        wanted += definitions.experts(x, *(one[expert : expert + 1] for one in meant[:2]), everyone, share)
    assert float((out - wanted).abs().max() / wanted.abs().max()) < 1e-5
