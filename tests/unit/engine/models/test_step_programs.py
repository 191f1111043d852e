"""Steps of few rows that are recorded and repeated: the same bits as the modules give, or no record at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.models.programs import AFTER, MOST_PROGRAMS
from agentspeed_kernels.cpu import native
from tests.support.needs import missing
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 16
GROUPED = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rope_theta": 5000.0, "attention_bias": False, "tie_word_embeddings": True,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
IDS = np.random.default_rng(12).integers(0, 300, 900).tolist()


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    library = native.library()
    if isinstance(library, native.Unavailable):
        missing(f"the native kernels cannot be built here: {library.reason}")


def models(folder: Path, dtype: Any, cache: Any = None) -> tuple[LoadedModel, LoadedModel]:
    """One that records, and one whose modules are called in every step."""
    made = [load(folder, dtype=dtype, pages=90, page_tokens=PAGE, cache=cache) for _ in range(2)]
    made[1].repeats = False
    return made[0], made[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache", [None, "fp8"])
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["latent", "grouped"])
def test_repeated_steps_give_the_bits_of_the_modules(
    config: dict[str, Any], cache: Any, dtype: str, tmp_path: Path
) -> None:
    """While contexts grow into new pages and tiles, other steps come between, and rows fork and end."""
    folder = make_checkpoint(config, tmp_path, seed=4, dtype=dtype)
    recording, plain = models(folder, dtype, cache)
    tokens = iter(IDS * 3)

    def both(entries: list[tuple[Trail, list[int]]]) -> None:
        other = [(Trail(PAGE, t.pages, t.shared, t.known), ids) for t, ids in entries]
        got = recording.forward(batch(PAGE, entries))  # type: ignore[arg-type]
        assert torch.equal(got, plain.forward(batch(PAGE, other)))  # type: ignore[arg-type]

    first, second = Trail(PAGE, list(range(40))), Trail(PAGE, list(range(40, 60)))
    both([(first, IDS[:500])])
    for _ in range(AFTER + 4):
        both([(first, [next(tokens)])])
    both([(second, IDS[:3])])
    for _ in range(AFTER + 30):
        both([(first, [next(tokens)]), (second, [next(tokens)])])
    both([(first, IDS[:20])])
    both([(first, [next(tokens)])])
    shared = list(range(40))[: first.known // PAGE]
    children = [
        Trail(PAGE, [*shared, 60 + 2 * i, 61 + 2 * i], shared=PAGE * len(shared), known=PAGE * len(shared))
        for i in range(4)
    ]
    for _ in range(AFTER + 3):
        both([(child, [next(tokens)]) for child in children])
    programs = recording._programs._programs
    assert set(programs) == {1, 2, 4}
    assert all(program.proven for program in programs.values())


def test_a_module_that_computes_outside_the_kernels_is_found_and_nothing_is_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(CONFIG, tmp_path, seed=4)
    recording, plain = models(folder, "float32")

    def scaled(x: torch.Tensor, residual: Any, state: Any, sizes: Any) -> tuple[torch.Tensor, Any]:
        return x * state.cos[:, :1], residual

    for model in (recording, plain):
        first, *middle, last = model._steps
        model._steps = (first, *middle[:4], scaled, *middle[4:], last)
    recording._programs._middle = list(recording._steps[1:-1])
    trails = [Trail(PAGE, list(range(10))) for _ in range(2)]
    for at in range(AFTER + 5):
        got, wanted = (
            model.forward(batch(PAGE, [(trail, [IDS[at]])]))
            for model, trail in zip((recording, plain), trails, strict=True)
        )
        assert torch.equal(got, wanted)
    assert recording._programs._programs == {} and not recording.repeats
    assert "a module computes something outside the kernels" in caplog.text


def test_without_the_library_no_step_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(CONFIG, tmp_path, seed=4)
    monkeypatch.setenv(native.SWITCH, "0")
    native.library.cache_clear()
    model = load(folder, pages=20, page_tokens=PAGE)
    trail = Trail(PAGE, list(range(10)))
    for at in range(AFTER + 3):
        model.forward(batch(PAGE, [(trail, [IDS[at]])]))
    monkeypatch.undo()
    native.library.cache_clear()
    assert model._programs._programs == {}


def test_records_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(CONFIG | {"num_hidden_layers": 2}, tmp_path, seed=4, dtype="bfloat16")
    model = load(folder, dtype="bfloat16", pages=90, page_tokens=PAGE)
    with caplog.at_level(logging.INFO, "agentspeed.engine"):
        for rows in range(1, MOST_PROGRAMS + 3):
            trails = [Trail(PAGE, [3 * i, 3 * i + 1]) for i in range(rows)]
            for at in range(AFTER + 2):
                model.forward(batch(PAGE, [(trail, [IDS[at]]) for trail in trails]))
    assert 0 < len(model._programs._programs) <= MOST_PROGRAMS
