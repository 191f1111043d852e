"""Choosing kernels: pure, explained, and never by silent shadowing."""

from __future__ import annotations

import io
import logging
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from agentspeed_kernels import registry
from agentspeed_kernels.cpu import native
from agentspeed_kernels.ops import OPS, WEIGHT_OPS
from agentspeed_kernels.packing import pack
from agentspeed_kernels.platform import NoDevice, Platform, detect
from agentspeed_kernels.registry import Registry, RegistryError, standard
from agentspeed_kernels.selection import UNBOUNDED, Kernels, NoKernel, Preferences, WrongPreference, select
from agentspeed_kernels.signature import KernelSpec, Need, Widths
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.workspace import Workspace
from tests.support.needs import missing

BARE = Platform(device="cpu", arch="x86_64", features=frozenset(), absent={native.FEATURE: "no C compiler found"})
FULL = Platform(
    device="cpu", arch="x86_64", features=frozenset({native.FEATURE, *(form.feature for form in native.forms_here())})
)
PLAIN = tuple(form for form in native.forms_here() if "f32" in form.kinds)


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    native.library.cache_clear()
    yield
    monkeypatch.undo()
    native.library.cache_clear()


def spec(name: str, priority: int, **changes: object) -> KernelSpec:
    fields = {"op": "rope", "name": name, "dtypes": frozenset({"float32"}), "device": "cpu", "call": print}
    return KernelSpec(**(fields | {"priority": priority} | changes))  # type: ignore[arg-type]


@dataclass
class Point:
    """An entry point of an installed package."""

    name: str
    offer: Callable[[], tuple[KernelSpec, ...]]

    def load(self) -> Callable[[], tuple[KernelSpec, ...]]:
        return self.offer


def install(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    def entry_points(group: str) -> tuple[Point, ...]:
        return points if group == "agentspeed.kernels" else ()

    monkeypatch.setattr(registry, "entry_points", entry_points)


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


def test_a_batch_invariant_need_takes_no_other_kernel_whatever_its_priority() -> None:
    fast, by_row = spec("fast", 10), spec("by row", -5, invariant=True)
    assert select(Need(op="rope", dtype="float32", rows=1), (fast, by_row), FULL).kernel is fast
    asked = Need(op="rope", dtype="float32", rows=1, invariant=True)
    assert select(asked, (fast, by_row), FULL).kernel is by_row
    with pytest.raises(
        NoKernel, match=r"no batch-invariant kernel for rope in float32 .*: fast: is not batch-invariant"
    ):
        select(asked, (fast,), FULL)


def test_nothing_that_fits_is_an_error_with_all_reasons() -> None:
    with pytest.raises(NoKernel, match=r"no kernel for rope in float64 with 1 row on cpu: a, b: formats are float32$"):
        select(Need(op="rope", dtype="float64", rows=1), (spec("a", 0), spec("b", 0)), FULL)
    for_all = Need(op="rope", dtype="float32", rows=UNBOUNDED, weights="int8", cache="fp8")
    with pytest.raises(
        NoKernel, match=r"float32, weights in int8, cache in fp8 with any number of rows on cpu: a: weights in int8 are"
    ):
        select(for_all, (spec("a", 0),), FULL)


def test_a_second_kernel_of_one_name_is_refused() -> None:
    with pytest.raises(RegistryError, match="registered twice"):
        Registry([spec("a", 0), spec("a", 1)])


def test_two_kernels_of_equal_rank_are_refused() -> None:
    with pytest.raises(RegistryError, match="same priority"):
        Registry([spec("a", 0), spec("b", 0)])


def test_installed_packages_add_kernels_through_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = spec("theirs", 50)

    install(monkeypatch, Point("a-package", lambda: (extra,)))
    chosen = select(Need(op="rope", dtype="float32", rows=1), standard().candidates("rope"), FULL).kernel
    assert (chosen.name, chosen.call, chosen.origin) == ("theirs", extra.call, "a-package")


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
    if not PLAIN:
        missing("no C kernels are written for this machine")
    # Of this thread and this logger: whatever else the process logs meanwhile is none of it.
    own = [record for record in caplog.records if record.thread == threading.get_ident()]
    said = [record.getMessage() for record in own if record.name == "agentspeed.kernels"]
    assert len(said) == 2
    assert said[0].startswith(f"float32 up to 8 rows: linear: {PLAIN[0].name}-f32 (")
    assert "not torch: priority 0 is below" in said[0]
    assert said[1].startswith("float32: linear: torch (")
    assert f"not {PLAIN[0].name}-f32: up to 8 rows" in said[1]


@pytest.mark.usefixtures("fresh_library")
def test_the_native_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert detect().absent == {native.FEATURE: "switched off by AGENTSPEED_NATIVE=0"}


@pytest.mark.usefixtures("fresh_library")
def test_a_named_form_leaves_those_above_it_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = native.forms_here()[-1]
    monkeypatch.setenv(native.SWITCH, lowest.name)
    library = native.library()
    if isinstance(library, native.Unavailable):
        missing(f"the native kernels cannot be built here: {library.reason}")
    here = detect()
    assert here.features <= {native.FEATURE, lowest.feature}
    assert here.lacks == {
        form.feature: f"AGENTSPEED_NATIVE is {lowest.name}" for form in native.forms_here() if form is not lowest
    }
    assert not here.absent


@pytest.mark.usefixtures("fresh_library")
def test_an_unknown_form_is_told_and_ignored(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = detect()
    native.library.cache_clear()
    monkeypatch.setenv(native.SWITCH, "sse9")
    assert detect() == before
    assert "AGENTSPEED_NATIVE=sse9 is neither 0 nor one of" in caplog.text


@dataclass(frozen=True)
class Built:
    """A library built by a compiler that fails at the first form here, in a cache of its own."""

    compiler: Path
    cache: Path
    here: Platform
    said: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """Once for all tests, and not optimised: a build takes seconds."""
    first, *others = native.forms_here()
    real = native._compiler()
    if real is None or not others:
        missing("needs a compiler and two forms of kernels")
    folder = tmp_path_factory.mktemp("old")
    old = folder / "old-cc"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *-DFORM={first.name}*) echo "no such instruction" >&2; exit 1;; esac\n'
        f'exec {real} "$@" -O0\n'
    )
    old.chmod(0o755)
    said = io.StringIO()
    listener = logging.StreamHandler(said)
    native.log.addHandler(listener)
    native.library.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CC", str(old))
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            here = detect()
        yield Built(old, folder / "cache", here, said.getvalue())
    finally:
        native.log.removeHandler(listener)
        native.library.cache_clear()


def test_a_form_that_does_not_compile_is_left_out_loudly_and_the_others_run(built: Built) -> None:
    first = native.forms_here()[0]
    assert first.feature not in built.here.features
    assert f"the {first.name} kernels are left out: no such instruction" in built.said
    assert native.FEATURE in built.here.features


def test_all_kernels_of_weights_take_one_layout() -> None:
    """A model packs its weights once; a kernel that wanted them otherwise would read numbers in another order."""
    tiled = {op: spec("tiles", 20, op=op, layout="tiles") for op in WEIGHT_OPS}
    plain = [spec("rows", 30 if op == "experts" else 0, op=op) for op in WEIGHT_OPS]
    kernels = Kernels(Registry([*tiled.values(), *plain]), BARE, "float32", tuple(WEIGHT_OPS))
    assert kernels.layout == "tiles"
    chosen = select(Need(op="experts", dtype="float32", rows=1, layout="tiles"), (tiled["experts"], *plain), BARE)
    assert chosen.kernel is tiled["experts"]
    assert "not rows: takes weights in rows, not tiles" in chosen.explain()


def test_weights_in_rows_are_handed_on_as_they_are() -> None:
    weight = torch.ones(4, 4)
    assert Kernels(standard(), BARE, "float32", ("linear",)).weight(weight) is weight


@pytest.mark.parametrize("shape", [(16, 32), (5, 3), (37, 70), (2, 3, 40, 33)])
def test_packed_weights_hold_the_numbers_once_and_give_rows_back(shape: tuple[int, ...]) -> None:
    weight = torch.arange(math.prod(shape), dtype=torch.float32).remainder(251).view(shape).bfloat16()
    packed = pack(weight)
    assert packed.shape == shape
    assert packed.data.count_nonzero() == weight.count_nonzero()
    assert torch.equal(packed.whole(), weight)
    if len(shape) == 2:
        ids = torch.tensor([shape[0] - 1, 0, 2, 2])
        assert torch.equal(packed.rows(ids), weight[ids])
    # Row i of a tile: inputs 2i and 2i + 1 of 16 outputs.
    outputs, inputs = shape[-2:]
    tile = packed.data.reshape(-1, *packed.data.shape[-5:])[0, (outputs - 1) // 16, (inputs - 1) // 32]
    last = tile[(inputs - 1) % 32 // 2, (outputs - 1) % 16, (inputs - 1) % 2]
    assert last == weight.reshape(-1, outputs, inputs)[0, -1, -1]


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
def test_the_native_kernels_are_built_once_a_machine(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = (built.cache / "agentspeed").iterdir()
    when = made.stat().st_mtime_ns
    monkeypatch.setenv("CC", str(built.compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.cache))
    native.library.cache_clear()
    again = native.library()
    assert isinstance(again, native.Library)
    assert (again.path, again.path.stat().st_mtime_ns) == (made, when)
    assert list(made.parent.iterdir()) == [made]


@pytest.mark.usefixtures("fresh_library")
def test_of_two_that_need_the_native_kernels_at_once_one_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = native.library()
    if isinstance(real, native.Unavailable):
        missing(f"the native kernels cannot be built here: {real.reason}")
    links, compiler = tmp_path / "links", tmp_path / "copying-cc"
    compiler.write_text(
        "#!/bin/sh\nfor last; do :; done\n"  # the last argument is what to write
        f'case "$1" in -shared) echo linked >> {links}; sleep 0.3; cp {real.path} "$last";; -*version) ;; '
        '*) : > "$last";; esac\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    with ThreadPoolExecutor(2) as pool:
        both = [one.result() for one in [pool.submit(native.library) for _ in range(2)]]
    assert all(isinstance(one, native.Library) for one in both)
    assert links.read_text() == "linked\n"


def test_a_workspace_grows_once_and_keeps_names_apart() -> None:
    workspace = Workspace()
    large = workspace.take("a", (4, 8), torch.float32)
    small = workspace.take("a", (2, 2), torch.float32)
    other = workspace.take("b", (2, 2), torch.float32)
    assert small.data_ptr() == large.data_ptr() != other.data_ptr()
    assert workspace.bytes == 4 * (32 + 4)


def test_a_kernel_that_does_not_take_a_size_a_page_or_a_format_of_a_role_is_passed_over_with_the_reason() -> None:
    candidates = (
        spec("any", 0),
        spec("aligned", 10, sizes={"R": Widths(multiple=16)}),
        spec("paged", 20, sizes={"page_tokens": Widths(multiple=64)}),
        spec("fp8", 30, cache=frozenset({"float8"})),
        spec("packed", 40, weights=frozenset({"int4"})),
        spec("short", 50, sizes={"R": Widths(least=1, most=64)}),
    )
    need = Need(op="rope", dtype="float32", rows=1, sizes={"R": 100, "page_tokens": 16})
    choice = select(need, candidates, FULL)
    assert choice.kernel.name == "any"
    assert {kernel.name: why for kernel, why in choice.rejected} == {
        "aligned": "R is a multiple of 16, not 100",
        "paged": "page_tokens is a multiple of 64, not 16",
        "fp8": "cache in float32 are not taken",
        "packed": "weights in float32 are not taken",
        "short": "R is up to 64, not 100",
    }
    stored = select(Need(op="rope", dtype="float32", rows=1, cache="float8"), candidates[:1] + candidates[3:4], FULL)
    assert stored.kernel.name == "fp8"


def test_a_kernel_can_be_forced_or_excluded_by_an_option() -> None:
    candidates = (spec("slow", 0), spec("fast", 10), spec("faster", 20))
    need = Need(op="rope", dtype="float32", rows=1)
    forced = select(need, candidates, FULL, Preferences.parse("rope=slow"))
    assert (forced.kernel.name, forced.rejected[0][1]) == ("slow", "slow is forced")
    excluded = select(need, candidates, FULL, Preferences.parse("-faster, linear=torch"))
    assert (excluded.kernel.name, excluded.rejected[0][1]) == ("fast", "excluded by option")
    assert select(need, candidates, FULL, Preferences.parse("-rope/faster,-rope/fast")).kernel.name == "slow"
    assert select(need, candidates, FULL, Preferences.parse("-linear/faster")).kernel.name == "faster"


@pytest.mark.parametrize("text", ["rpoe=slow", "slow", "rope=", "-"])
def test_an_option_that_names_no_choice_is_refused_with_what_may_be_written(text: str) -> None:
    with pytest.raises(WrongPreference, match="Write op=name to force one"):
        Preferences.parse(text)


def test_the_option_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSPEED_KERNELS", "linear=torch,-native")
    asked = Preferences.from_environment()
    assert (asked.forced, asked.excluded) == ({"linear": "torch"}, frozenset({"native"}))


def test_a_package_that_cannot_be_loaded_is_left_out_with_a_warning_that_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> tuple[KernelSpec, ...]:
        raise OSError("libfast.so: no such file")

    install(monkeypatch, Point("broken-package", broken), Point("good-package", lambda: (spec("theirs", 50),)))
    found = {candidate.name for candidate in standard().candidates("rope")}
    assert "theirs" in found
    assert "kernels of broken-package are left out: loading them failed: OSError: libfast.so" in caplog.text


def test_a_foreign_kernel_that_ties_with_another_is_left_out_with_a_warning_that_names_its_package(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Point("a-package", lambda: (spec("theirs", 0), spec("also", 50))))
    found = {candidate.name for candidate in standard().candidates("rope")}
    assert "also" in found and "theirs" not in found
    assert "a kernel of a-package is left out" in caplog.text and "same priority" in caplog.text


def wrong_norm(x: Any, weight: Any, eps: float, out: Any) -> None:
    out.copy_(x)


def raising_norm(x: Any, weight: Any, eps: float, out: Any) -> None:
    raise IndexError("row 7")


@pytest.mark.parametrize(("call", "why"), [(wrong_norm, "its error is"), (raising_norm, "it raised IndexError: row 7")])
def test_a_foreign_kernel_that_fails_its_check_is_left_out_and_the_next_best_runs(
    call: Callable[..., Any], why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = spec("theirs", 50, op="rms_norm", call=call)
    install(monkeypatch, Point("a-package", lambda: (theirs,)))
    kernels = Kernels(standard(), BARE, "float32", ("rms_norm",), check=conformance.objection)
    assert kernels["rms_norm"].choice(3).kernel.name == "torch"
    assert "<kernel rms_norm/theirs of a-package> is left out: " + why in caplog.text


def test_a_sound_foreign_kernel_passes_its_check_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = next(one for one in standard().candidates("rms_norm") if one.name == "torch")
    install(monkeypatch, Point("a-package", lambda: (spec("theirs", 50, op="rms_norm", call=honest.call),)))
    kernels = Kernels(standard(), BARE, "float32", ("rms_norm",), check=conformance.objection)
    assert kernels["rms_norm"].choice(3).kernel.name == "theirs"
    (line,) = kernels["rms_norm"].explain()
    assert line.startswith("any rows: rms_norm: theirs (")
    assert "; not torch: priority 0 is below 50)" in line


def test_a_gpu_that_is_not_there_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoDevice, match="No CUDA device can be used"):
        detect("cuda")
