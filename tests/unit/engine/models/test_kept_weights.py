"""Matrices in bfloat16 below activations in float32: kept where the checkpoint has them so, with no number changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agentspeed_engine.models.catalog import load, read_source
from agentspeed_engine.models.kept_weights import kept_weights
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.models.programs import AFTER
from agentspeed_engine.models.source import describe
from agentspeed_engine.models.weight_formats import WeightFormat
from agentspeed_engine.serve.options import EngineOptions, build
from agentspeed_kernels.cpu import native
from agentspeed_kernels.platform import detect, named
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import SWITCH
from agentspeed_kernels.workspace import Workspace
from tests.conformance.family_configs import random_config
from tests.support.paged import Trail, batch
from tests.support.random_checkpoint import make_checkpoint
from tests.support.thread_sums import logits_of, on_two_ranks
from tests.support.weights_held import bytes_held
from tests.unit.engine.models.test_int8_weights import GROUPED, LATENT

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 64
IDS = np.random.default_rng(5).integers(0, 250, 120).tolist()
FORMS = [form for form in (native.AVX512, native.AVX2, native.NEON) if form.feature in detect().features]
needs_native = pytest.mark.skipif(not FORMS, reason="the native kernels are absent")


@pytest.fixture(scope="module", params=[LATENT, GROUPED], ids=["latent", "grouped, tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("model"), seed=8, dtype="bfloat16")


def loaded(folder: Path, weights: WeightFormat | None, **options: Any) -> LoadedModel:
    return load(folder, dtype="float32", pages=6, page_tokens=PAGE, weights=weights, **options)


def logits(model: LoadedModel, at_once: int = 8) -> torch.Tensor:
    """Of a prompt, so many tokens at once, and of tokens decoded behind it for long enough that steps are repeated."""
    trail = Trail(PAGE, [3, 1, 4, 0])
    steps = [IDS[at : at + at_once] for at in range(0, 96, at_once)] + [[token] for token in IDS[96 : 102 + AFTER]]
    return torch.cat([model.forward(batch(PAGE, [(trail, step)])).clone() for step in steps])


@needs_native
@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
@pytest.mark.parametrize("op", ["linear", "heads_linear", "experts"])
def test_products_have_the_bits_that_they_have_with_weights_in_float32(op: str, form: native.Form) -> None:
    kernels = {spec.name: spec for spec in standard().candidates(op)}
    noise = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    for suffix, most in (("", 8), ("-blocks", 40)):
        plain, kept = kernels[f"{form.name}-f32{suffix}"], kernels[f"{form.name}-f32-bf16{suffix}"]
        for rows in (1, 2, 3, 7, most):
            for outputs, inputs in ((37, 83), (64, 512), (130, 517), (5, 16)):
                run: Callable[..., torch.Tensor]
                if op == "linear":
                    x, matrices = drawn(rows, inputs), [drawn(outputs, inputs).bfloat16()]

                    def run(call: Any, held: list[torch.Tensor], x: torch.Tensor = x) -> torch.Tensor:
                        out = torch.empty(x.shape[0], held[0].shape[0])
                        call(x, held[0], held[0][:, 0].float().contiguous(), out)
                        return out

                elif op == "heads_linear":
                    x, matrices = drawn(rows, 3, inputs), [drawn(3, outputs, inputs).bfloat16()]

                    def run(call: Any, held: list[torch.Tensor], x: torch.Tensor = x) -> torch.Tensor:
                        out = torch.empty(x.shape[0], 3, held[0].shape[1])
                        call(x, held[0], out)
                        return out

                else:
                    x = drawn(rows, inputs)
                    matrices = [drawn(4, 2 * outputs, inputs).bfloat16(), drawn(4, inputs, outputs).bfloat16()]

                    def run(call: Any, held: list[torch.Tensor], x: torch.Tensor = x) -> torch.Tensor:
                        ids = (torch.arange(2 * x.shape[0]).view(-1, 2) * 7) % 4
                        out = torch.empty(x.shape)
                        call(x, *held, ids, torch.full(ids.shape, 0.3), Workspace(), out)
                        return out

                wanted = run(plain.call, [matrix.float() for matrix in matrices])
                assert torch.equal(run(kept.call, matrices), wanted)


@needs_native
def test_steps_of_few_rows_have_the_same_bits_and_are_repeated(folder: Path) -> None:
    kept = loaded(folder, "bfloat16")
    assert torch.equal(logits(kept), logits(loaded(folder, None)))
    assert [program.proven for rows, program in kept._programs._programs.items() if rows == 1] == [True]


def test_long_prompts_differ_by_the_order_of_sums_alone(folder: Path) -> None:
    wanted = logits(loaded(folder, None), at_once=96)
    torch.testing.assert_close(logits(loaded(folder, "bfloat16"), at_once=96), wanted, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("model_type", ["deepseek_v32", "qwen3_moe", "glm4_moe_lite", "llama"])
def test_other_families_have_the_same_bits(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(random_config(model_type, 3), tmp_path, seed=2, dtype="bfloat16")
    assert kept_weights(read_source(folder), "float32", detect()) == "bfloat16"
    assert torch.equal(logits(loaded(folder, "bfloat16")), logits(loaded(folder, None)))


def test_batch_invariant_steps_have_the_same_bits_for_any_rows(folder: Path) -> None:
    models = [loaded(folder, weights, batch_invariant=True) for weights in ("bfloat16", None)]
    one, two = (logits(model, at_once=48) for model in models)
    assert torch.equal(one, two)


def test_what_is_counted_is_what_is_held(folder: Path) -> None:
    kept, plain = loaded(folder, "bfloat16"), loaded(folder, None)
    assert kept.info.weight_bytes < 0.6 * plain.info.weight_bytes
    assert 0.98 * kept.info.weight_bytes < bytes_held(kept) < 1.02 * kept.info.weight_bytes


@needs_native
def test_ranks_keep_their_pieces_so(folder: Path) -> None:
    def cut(weights: WeightFormat | None) -> tuple[torch.Tensor, int]:
        models = on_two_ranks(folder, dtype="float32", pages=6, page_tokens=PAGE, weights=weights)
        return logits_of(models, logits), sum(map(bytes_held, models))

    (kept, taken), (plain, whole) = cut("bfloat16"), cut(None)
    assert torch.equal(kept, plain)
    assert taken < 0.6 * whole


@needs_native
def test_a_checkpoint_in_bfloat16_is_kept_so_and_any_other_is_not(tmp_path: Path) -> None:
    here = detect()
    folder = make_checkpoint(LATENT, tmp_path / "half", dtype="bfloat16")
    assert kept_weights(read_source(folder), "float32", here) == "bfloat16"
    assert kept_weights(read_source(folder), "float64", here) is None
    assert kept_weights(read_source(folder), "bfloat16", here) is None
    other = make_checkpoint(LATENT, tmp_path / "whole", dtype="float32")
    assert kept_weights(read_source(other), "float32", here) is None


@needs_native
def test_routers_and_norms_may_be_stored_in_float32_and_no_matrix_may(tmp_path: Path) -> None:
    folder = make_checkpoint(LATENT, tmp_path, dtype="bfloat16")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    widened = {name for name, tensor in tensors.items() if tensor.dim() == 1 or name.endswith(".gate.weight")}
    tensors = {name: tensor.float() if name in widened else tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    assert kept_weights(read_source(folder), "float32", detect()) == "bfloat16"
    matrix = next(name for name in tensors if name.endswith("o_proj.weight"))
    save_file(tensors | {matrix: tensors[matrix].float()}, file)
    assert kept_weights(read_source(folder), "float32", detect()) is None


def test_a_folder_that_is_not_whole_is_left_to_the_load_and_one_without_weights_to_its_configuration(
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(LATENT, tmp_path, dtype="bfloat16")
    file = folder / "model.safetensors"
    whole = kept_weights(read_source(folder), "float32", detect())
    file.write_bytes(file.read_bytes()[:40])
    assert kept_weights(read_source(folder), "float32", detect()) is None
    file.unlink()
    assert kept_weights(read_source(folder), "float32", detect()) == whole


def test_where_torch_alone_computes_or_a_kernel_is_forced_matrices_are_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_source(make_checkpoint(LATENT, tmp_path, dtype="bfloat16"))
    assert kept_weights(source, "float32", named("cpu:torch")) is None
    monkeypatch.setenv(SWITCH, "linear=torch")
    assert kept_weights(source, "float32", detect()) is None


@needs_native
def test_an_engine_says_so_and_counts_it(folder: Path) -> None:
    said: list[str] = []
    built = build(EngineOptions(model=str(folder), dtype="float32", device="cpu", pages=8, threads=1), said.append)
    built.close()
    taken = describe(folder, dtype="float32", weights="bfloat16").weight_bytes
    assert any(f"{taken / 1e6:.0f} MB of weights (matrices in bfloat16, as they are stored)" in line for line in said)


@needs_native
def test_a_model_that_fits_in_16_bits_alone_is_not_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentspeed_engine.serve import sizing
    from agentspeed_engine.serve.memory_limit import MemoryLimit

    kept, whole = (describe(folder, dtype="float32", weights=weights).weight_bytes for weights in ("bfloat16", None))
    between = MemoryLimit((kept + whole) // 2 + 400_000, "this container")
    assert kept < 0.9 * between.bytes < whole
    monkeypatch.setattr(sizing, "memory_limit", lambda: between)
    options = EngineOptions(model=str(folder), dtype="float32", device="cpu", pages=2, page_tokens=16, threads=1)
    build(options, lambda what: None).close()
