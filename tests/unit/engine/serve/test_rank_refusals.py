"""Ranks that cannot be are refused with what can be, before a weight is read or a process started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.source import describe
from agentspeed_engine.serve import rank_start
from agentspeed_engine.serve.options import build, options_from
from agentspeed_engine.serve.rank_options import RankOptions
from agentspeed_engine.serve.rank_shares import shares_of
from tests.support.paged import CONFIG


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration alone: whoever read a weight would find none."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def refusal(model: object, **options: Any) -> EngineFault:
    with pytest.raises(EngineFault) as refused:
        _ = build(options_from({"model": str(model), "device": "cpu", "dtype": "float32", **options}))
    assert refused.value.code == "bad_options"
    return refused.value


def test_a_number_of_ranks_that_does_not_divide_the_model_is_refused_with_those_that_do(folder: Path) -> None:
    fault = refusal(folder, tp=3)
    assert "tp is 3" in fault.message and "num_attention_heads 4 does not divide by 3" in fault.message
    assert fault.remedy == "This model can be cut over 1, 2, 4 ranks."
    assert "vocabulary 9" in refusal("noop:9:0", tp=2).message


def test_what_is_not_there_is_refused_by_its_name(folder: Path) -> None:
    assert "dp is 40 and tp 2" in refusal("noop:64:0", dp=40, tp=2).message
    assert "dp is 3 and tp 1, and n_routed_experts 8 does not divide by 3" in refusal(folder, dp=3).message
    assert "batch_invariant is asked for on 2 ranks" in refusal(folder, tp=2, batch_invariant=True).message
    assert "Give ep as one of 1, 2, 4" in refusal(folder, tp=4, ep=3).remedy


def test_memory_is_counted_for_all_ranks_of_a_machine_and_for_each_gpu_by_itself(folder: Path) -> None:
    """The latent is kept by every rank, and so are norms and routers; all else is cut."""
    alone = describe(folder, dtype="float32", page_tokens=64)
    options = {"model": str(folder), "dtype": "float32", "device": "cpu", "tp": 2}
    machine = shares_of(options_from(options), alone)
    gpu = shares_of(options_from(options | {"device": "cuda"}), alone)
    assert machine.bytes_per_page == 2 * alone.bytes_per_page and gpu.bytes_per_page == alone.bytes_per_page
    assert alone.parameters < machine.parameters < 1.2 * alone.parameters
    assert machine.parameters == 2 * gpu.parameters


@pytest.mark.parametrize("options", [{"tp": 0}, {"tp": 65}, {"rank_seconds": 0}, {"rank_seconds": 86_401}, {"ep": 0}])
def test_numbers_that_no_group_has_are_refused(folder: Path, options: dict[str, Any]) -> None:
    assert next(iter(options)) in refusal(folder, **options).message


def test_threads_are_counted_where_the_system_names_no_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    asked: list[int | None] = []

    def started(options: RankOptions, say: object) -> None:
        asked.append(options.threads)
        raise EngineFault("rank_lost", "None is started here.", "")

    monkeypatch.setattr(rank_start, "RankProcesses", started)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    with pytest.raises(EngineFault, match="None is started here"):
        _ = build(options_from({"model": "noop:64:0", "tp": 2}))
    assert asked == [4]
