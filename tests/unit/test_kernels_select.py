"""Choosing kernels: pure, explained, and never by silent shadowing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from agentspeed_kernels import registry
from agentspeed_kernels.cpu import native
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import Platform, detect
from agentspeed_kernels.registry import Registry, RegistryError, standard
from agentspeed_kernels.select import Kernels, NoKernel, select
from agentspeed_kernels.signature import KernelSpec, Need
from agentspeed_kernels.workspace import Workspace
from tests.needs import missing

BARE = Platform(device="cpu", arch="x86_64", features=frozenset(), absent={native.FEATURE: "no C compiler found"})
FULL = Platform(device="cpu", arch="x86_64", features=frozenset({native.FEATURE}))


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    native.library.cache_clear()
    yield
    monkeypatch.undo()
    native.library.cache_clear()


def spec(name: str, priority: int, **changes: object) -> KernelSpec:
    fields = {"op": "rope", "name": name, "dtypes": frozenset({"float32"}), "device": "cpu", "call": print}
    return KernelSpec(**(fields | {"priority": priority} | changes))  # type: ignore[arg-type]


def test_the_highest_priority_that_fits_is_chosen() -> None:
    slow, fast, small = spec("slow", 0), spec("fast", 10, most_rows=8), spec("wide", 20, dtypes=frozenset({"bfloat16"}))
    few = select(Need(op="rope", dtype="float32", rows=8), (slow, fast, small), FULL)
    many = select(Need(op="rope", dtype="float32", rows=9), (slow, fast, small), FULL)
    assert (few.kernel, many.kernel) == (fast, slow)


def test_every_other_candidate_is_explained() -> None:
    choice = select(
        Need(op="rope", dtype="float32", rows=9),
        (
            spec("slow", 0),
            spec("slower", -1),
            spec("few", 10, most_rows=8),
            spec("half", 20, dtypes=frozenset({"bfloat16"})),
            spec("c", 30, features=frozenset({native.FEATURE})),
            spec("gpu", 40, device="cuda"),
        ),
        BARE,
    )
    reasons = {kernel.name: why for kernel, why in choice.rejected}
    assert reasons == {
        "slower": "priority -1 is below 0",
        "few": "up to 8 rows",
        "half": "formats are bfloat16",
        "c": "needs native-c: no C compiler found",
        "gpu": "runs on cuda",
    }


def test_nothing_that_fits_is_an_error_with_all_reasons() -> None:
    with pytest.raises(NoKernel, match=r"no kernel for rope in float64 with 1 rows on cpu: a: formats are float32"):
        select(Need(op="rope", dtype="float64", rows=1), (spec("a", 0),), FULL)


def test_a_second_kernel_of_one_name_is_refused() -> None:
    with pytest.raises(RegistryError, match="registered twice"):
        Registry([spec("a", 0), spec("a", 1)])


def test_two_kernels_of_equal_rank_are_refused() -> None:
    with pytest.raises(RegistryError, match="same priority"):
        Registry([spec("a", 0), spec("b", 0)])


def test_installed_packages_add_kernels_through_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = spec("theirs", 50)

    class Point:
        def load(self) -> object:
            return lambda: (extra,)

    def entry_points(group: str) -> tuple[Point, ...]:
        return (Point(),) if group == "agentspeed.kernels" else ()

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert select(Need(op="rope", dtype="float32", rows=1), standard().candidates("rope"), FULL).kernel is extra


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(RegistryError, match="unknown op"):
        Registry([spec("a", 0, op="rpoe")])


def test_without_a_compiler_every_op_still_runs_and_the_fallback_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "agentspeed.kernels"):
        kernels = Kernels(standard(), BARE, "float32", tuple(OPS))
    assert all(callable(kernels[op].at(rows)) for op in OPS for rows in (1, 1000))
    assert "slower kernels run because native-c is absent: no C compiler found" in caplog.text


def test_what_runs_and_why_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "agentspeed.kernels"):
        kernels = Kernels(standard(), FULL, "float32", ("linear",))
        kernels["linear"].at(1)
        kernels["linear"].at(1)
    assert [record.getMessage() for record in caplog.records] == [
        "float32 up to 8 rows: linear: native (not torch: priority 0 is below 10)",
        "float32: linear: torch (not native: up to 8 rows)",
    ]


@pytest.mark.usefixtures("fresh_library")
def test_the_native_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert detect().absent == {native.FEATURE: "switched off by AGENTSPEED_NATIVE=0"}


@pytest.mark.usefixtures("fresh_library")
def test_a_compiler_that_fails_is_a_reason_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bin")
    broken = folder / "broken-cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such target" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    why = detect().absent[native.FEATURE]
    assert "failed: no such target" in why


@pytest.mark.usefixtures("fresh_library")
def test_a_user_without_a_home_goes_without_native_kernels_and_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert "XDG_CACHE_HOME" in detect().absent[native.FEATURE]


def test_costs_count_the_context_once_whatever_the_number_of_rows() -> None:
    sizes = {"H": 8, "R": 512, "rope": 64, "C": 4096}
    one, eight = (OPS["mla_rows"].cost(sizes | {"T": rows}, 4) for rows in (1, 8))
    assert eight.flops == 8 * one.flops
    assert eight.bytes < 1.03 * one.bytes
    assert one.limit_seconds(bytes_per_second=one.bytes, flops_per_second=10 * one.flops) == 1.0


@pytest.mark.usefixtures("fresh_library")
def test_the_native_kernels_are_built_once_a_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    first = native.library()
    if isinstance(first, native.Unavailable):
        missing(f"the native kernels cannot be built here: {first.reason}")
    built = first.path.stat().st_mtime_ns
    native.library.cache_clear()
    second = native.library()
    assert isinstance(second, native.Library)
    assert (second.path, second.path.stat().st_mtime_ns) == (first.path, built)
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_a_workspace_grows_once_and_keeps_names_apart() -> None:
    workspace = Workspace()
    large = workspace.take("a", (4, 8), torch.float32)
    small = workspace.take("a", (2, 2), torch.float32)
    other = workspace.take("b", (2, 2), torch.float32)
    assert small.data_ptr() == large.data_ptr() != other.data_ptr()
    assert workspace.bytes == 4 * (32 + 4)
