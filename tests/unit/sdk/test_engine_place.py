"""Where an engine computes: a GPU that was asked for and is not there, and one that is there and does not serve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.device_steps import put
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.sampling_rows import RepeatedRows, on_device
from agentspeed_engine.exec.step_input import Sample
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.models.catalog import describe
from agentspeed_engine.models.loaded import out_of_memory
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_engine.serve.memory_limit import MemoryLimit
from agentspeed_engine.serve.options import EngineOptions
from agentspeed_engine.serve.place import objection, placed
from agentspeed_engine.serve.sizing import sizes
from agentspeed_kernels.platform import Platform, named
from agentspeed_kernels.registry import Registry, standard
from agentspeed_kernels.triton.sampling import SamplingRows
from tests.conformance.family_configs import random_config

BENCH = Path(__file__).parents[3] / "bench/models"
LATENT, GROUPED = f"random:{BENCH / 'tiny.json'}", f"random:{BENCH / 'tiny-qwen3-moe.json'}"
GPU = Platform(device="cuda", arch="sm_90", features=frozenset({"cuda", "triton"}), model="A GPU")
ROOM = MemoryLimit(10**9, "the GPU (A GPU)", idle=True)


def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_that_was_asked_for_and_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_gpu(monkeypatch)
    with pytest.raises(EngineFault, match=r"device is 'cuda'.*Give device='cpu'") as refused:
        placed(EngineOptions(model=LATENT, device="cuda"))
    assert refused.value.code == "bad_options"


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_an_engine_is_on_the_cpu_and_says_nothing(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    without_a_gpu(monkeypatch)
    place = placed(EngineOptions(model=LATENT, device=device))  # type: ignore[arg-type]
    assert (place.device, place.memory, place.said) == ("cpu", None, "")


def test_a_gpu_is_left_alone_that_does_not_serve_the_model_well() -> None:
    assert objection(EngineOptions(model=LATENT), GPU, ROOM) is None
    assert objection(EngineOptions(model=GROUPED), GPU, ROOM) is None
    assert "float64" in str(objection(EngineOptions(model=LATENT, dtype="float64"), GPU, ROOM))
    small = MemoryLimit(1000, "the GPU (A GPU)", idle=True)
    assert "the weights take" in str(objection(EngineOptions(model=LATENT), GPU, small))
    bare = Platform(device="cuda", arch="sm_90", features=frozenset({"cuda"}), absent={"triton": "not installed"})
    assert "not installed" in str(objection(EngineOptions(model=LATENT), bare, ROOM))


def test_a_gpu_serves_weights_in_fp8_where_it_converts_them_and_no_others_in_8_bits() -> None:
    assert objection(EngineOptions(model=LATENT, weights="fp8"), named("cuda:90"), ROOM) is None
    assert "does not convert e4m3" in str(objection(EngineOptions(model=LATENT, weights="fp8"), named("cuda:80"), ROOM))
    assert "only a CPU" in str(objection(EngineOptions(model=LATENT, weights="int8"), named("cuda:90"), ROOM))


def test_a_gpu_without_kernels_for_a_cache_in_fp8_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [spec for spec in standard() if spec.device == "cpu" or spec.cache is None]
    monkeypatch.setattr("agentspeed_kernels.registry.standard", lambda: Registry(few))
    for model, op in ((LATENT, "latent_append"), (GROUPED, "qkv_append")):
        why = str(objection(EngineOptions(model=model, kv_cache_dtype="fp8"), named("cuda:90"), ROOM))
        assert f"no kernel for {op} in bfloat16" in why and "cache in fp8 are not taken" in why


def test_weights_in_fp8_need_half_the_room_of_a_gpu() -> None:
    taken = describe(LATENT, dtype="bfloat16").weight_bytes
    room = MemoryLimit(int(0.9 * taken), "the GPU (A GPU)", idle=True)
    assert "the weights take" in str(objection(EngineOptions(model=LATENT), named("cuda:90"), room))
    assert objection(EngineOptions(model=LATENT, weights="fp8"), named("cuda:90"), room) is None


def test_a_gpu_is_left_alone_by_models_with_sparse_attention(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(random_config("deepseek_v32", 0)))
    assert "sparse" in str(objection(EngineOptions(model=f"random:{tmp_path / 'config.json'}"), GPU, ROOM))


def test_a_pool_takes_most_of_what_weights_leave_of_a_gpu() -> None:
    options = EngineOptions(model=LATENT, dtype="float32", device="cuda")
    pages, _ = sizes(options, 10**9, 10**6, 50_000_000, ROOM)
    assert pages == int(0.85 * (10**9 - 4 * 50_000_000)) // 10**6


@pytest.mark.parametrize(
    "said",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "a kernel that is loaded", "a library"],
)
def test_what_a_gpu_has_no_room_for_is_named(said: RuntimeError) -> None:
    with (
        pytest.raises(EngineFault, match=r"The GPU has no room for a step: .*CUDA") as refused,
        out_of_memory("a step"),
    ):
        raise said
    assert refused.value.code == "out_of_memory" and "prefill_chunk" in refused.value.remedy


def test_samples_reach_the_sampling_kernel_as_they_were_asked_for() -> None:
    asked = [Sampling(), Sampling(temperature=0.7, top_k=9, top_p=0.9, min_p=0.1, logprobs=3), Sampling(logprobs=0)]
    samples = [
        Sample(TurnSpec(turn=i, branch=BranchId(i), sampling=one, draw_key=(i, 2, 3), stop_strings=(), grammar=None,
                        consumed_ids=(), prompt_tokens=1), 5 + i) for i, one in enumerate(asked)
    ]  # fmt: skip
    allowed = np.zeros(70, np.bool_)
    allowed[[0, 33, 69]] = True
    more = Adjustment(np.array([3, 69]), np.array([2.0, 2.0], np.float32), np.array([0.0, 1.0], np.float32))
    rows = on_device(samples, {1: allowed}, {2: more}, torch.full((3, 70), -4.0))
    assert rows.temperature.tolist() == [0.0, 0.7, 0.0] and rows.top_k.tolist() == [0, 9, 0]
    assert rows.top_p.tolist() == [1.0, 0.9, 1.0] and rows.min_p.tolist() == [0.0, 0.1, 0.0]
    assert rows.asked.tolist() == [-1, 3, 0] and rows.mask_row.tolist() == [-1, 0, -1]
    assert rows.mask_words.tolist() == [[1, 2, 1 << 5]]
    assert rows.changed_row.tolist() == [-1, -1, 0] and rows.changed is not None
    assert rows.changed[0].tolist() == [-8.0 if i == 3 else -7.0 if i == 69 else -4.0 for i in range(70)]
    assert len(set(rows.state.tolist())) == 3


def turn_of(number: int, asked: Sampling) -> TurnSpec:
    return TurnSpec(turn=number, branch=BranchId(number), sampling=asked, draw_key=(number, 2, 3),
                    stop_strings=(), grammar=None, consumed_ids=(), prompt_tokens=1)  # fmt: skip


def told(rows: SamplingRows) -> dict[str, object]:
    names = ("temperature", "top_k", "top_p", "min_p", "asked", "mask_row", "mask_words", "changed_row", "state")
    return {name: getattr(rows, name).tolist() for name in names}


def test_what_is_asked_of_each_step_is_the_same_whoever_was_asked_before() -> None:
    repeated, logits = RepeatedRows(), torch.zeros(2, 70)
    one, other, third = (
        turn_of(1, Sampling(temperature=0.7)),
        turn_of(2, Sampling()),
        turn_of(3, Sampling(temperature=0.7, top_k=5)),
    )
    allowed = {0: np.arange(70) < 9}
    steps: list[tuple[list[TurnSpec], int, dict[int, np.ndarray]]] = [
        ([one, other], 5, {}), ([one, other], 6, {}), ([other, one], 7, {}), ([other, one], 8, allowed),
        ([other, one], 9, {}), ([one, third], 9, {}), ([third], 10, {}),
    ]  # fmt: skip
    for turns, position, masks in steps:
        samples = [Sample(turn, position + place) for place, turn in enumerate(turns)]
        assert told(repeated.on_device(samples, masks, {}, logits)) == told(on_device(samples, masks, {}, logits))


@pytest.mark.parametrize("at", [[0, 1, 2], [3], [5, 4], [0, 2, 5]])
@pytest.mark.parametrize("place", [[1, 2, 3], [0, 4, 2]])
def test_a_token_that_only_the_device_knows_is_fed_where_the_step_wants_it(at: list[int], place: list[int]) -> None:
    ids, place = torch.full((6,), -1), place[: len(at)]
    put(ids, np.array(at), torch.arange(10, 15), np.array(place))
    assert ids.tolist() == [10 + place[at.index(row)] if row in at else -1 for row in range(6)]
