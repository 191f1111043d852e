"""A kernel that is compiled is launched without the compiler, and one that would be another is not taken for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agentspeed_kernels.triton.direct import DirectKernel, Hooks, Ready, direct, launched_directly, specialised

HERE = torch.zeros(64, dtype=torch.bfloat16)
ARGUMENTS: tuple[Any, ...] = (
    0, 1, 2, 16, 17, -16, -1, 2**31 - 16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 16, 2**40, 2**40 + 1, 3.0, 1.0,
    HERE, HERE[1:], HERE[8:], HERE.float(), HERE.to(torch.int64),
)  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_arguments_that_the_compiler_tells_apart_have_keys_of_their_own() -> None:
    from triton.backends.nvidia.compiler import CUDABackend  # type: ignore[import-untyped]
    from triton.runtime.jit import native_specialize_impl  # type: ignore[import-untyped]

    for one, other in combinations(ARGUMENTS, 2):
        theirs = [native_specialize_impl(CUDABackend, given, False, True, True) for given in (one, other)]
        ours = [specialised((given,))[0] for given in (one, other)]
        assert theirs[0] == theirs[1] or ours[0] != ours[1], (one, other, theirs)


@dataclass
class Kernel:
    """Stands in for one of Triton's: it tells what went through the compiler, and what to the driver."""

    compiled: list[tuple[Any, ...]] = field(default_factory=list)
    launched: list[tuple[Any, ...]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **constants: self.compiled.append((grid, given, constants))

    def readied(self, compiled: Any, kernel: Any, device: int, count: int, constants: dict[str, Any]) -> Ready:
        return Ready(
            launch=lambda *given: self.launched.append(given),
            function=77,
            cooperative=False,
            early=True,
            metadata=(4, 1, 0),
            stream=lambda device: 5,
            device=device,
            constants=tuple(constants[name] for name in ("BLOCK",)),
        )


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    found = Kernel()
    yield found
    assert not found.launched or found.compiled, "nothing is launched that was not compiled"


def test_the_second_launch_of_a_kind_goes_to_the_driver_with_addresses_and_numbers(kernel: Kernel) -> None:
    launcher, other = DirectKernel(kernel, kernel.readied, []), torch.ones(64, dtype=torch.bfloat16)
    launcher[3, 2](HERE, 48, 0.5, BLOCK=16, num_warps=4)
    launcher[7,](other, 64, 0.25, BLOCK=16, num_warps=4)
    assert len(kernel.compiled) == 1
    (launched,) = kernel.launched
    assert launched[:5] == (7, 1, 1, 5, 77) and launched[9] == (4, 1, 0)
    assert launched[-4:] == (other.data_ptr(), 64, 0.25, 16)


@pytest.mark.parametrize(
    ("given", "constants"),
    [
        ((HERE[1:], 48, 0.5), {"BLOCK": 16}),
        ((HERE, 1, 0.5), {"BLOCK": 16}),
        ((HERE, 49, 0.5), {"BLOCK": 16}),
        ((HERE, 2**33, 0.5), {"BLOCK": 16}),
        ((HERE.float(), 48, 0.5), {"BLOCK": 16}),
        ((HERE, 48, 0.5), {"BLOCK": 32}),
        ((HERE, 48, 0.5), {"BLOCK": 16, "num_warps": 8}),
        ((HERE, 48, None), {"BLOCK": 16}),
        ((HERE, 48, True), {"BLOCK": 16}),
        ((HERE, 48, 2**64), {"BLOCK": 16}),
    ],
)
def test_a_launch_of_another_kind_goes_through_the_compiler(
    kernel: Kernel, given: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    launcher = DirectKernel(kernel, kernel.readied, [])
    for _ in range(2):
        launcher[1,](HERE, 48, 0.5, BLOCK=16)
    launcher[1,](*given, **constants)
    assert len(kernel.compiled) == 2 and len(kernel.launched) == 1
    assert kernel.compiled[1] == ((1,), given, constants)


def test_what_only_the_compiler_can_launch_stays_with_it(kernel: Kernel) -> None:
    launcher = DirectKernel(kernel, lambda *_: None, [])
    for _ in range(3):
        launcher[1,](HERE, BLOCK=16)
    assert len(kernel.compiled) == 3 and not kernel.launched


def test_who_watches_launches_hears_of_all_of_them(kernel: Kernel) -> None:
    watched: list[Any] = []
    launcher = DirectKernel(kernel, kernel.readied, watched)
    launcher[1,](HERE, BLOCK=16)
    watched.append(print)
    launcher[1,](HERE, BLOCK=16)
    watched.clear()
    launcher[1,](HERE, BLOCK=16)
    assert len(kernel.compiled) == 2 and len(kernel.launched) == 1


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_puts_a_chain_of_hooks_of_his_own_in_place_hears_of_launches(kernel: Kernel, name: str) -> None:
    runtime = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=None)
    launcher, before = DirectKernel(kernel, kernel.readied, Hooks(runtime)), getattr(runtime, name)
    for chain in (before, SimpleNamespace(calls=[print]), print, before):
        setattr(runtime, name, chain)
        launcher[1,](HERE, BLOCK=16)
    assert len(kernel.compiled) == 3 and len(kernel.launched) == 1


@pytest.fixture
def asked_again() -> Iterator[None]:
    launched_directly.cache_clear()
    yield
    launched_directly.cache_clear()


@pytest.mark.usefixtures("asked_again")
def test_a_triton_that_is_not_known_launches_all_kernels_itself_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver: Any = pytest.importorskip("triton.backends.nvidia.driver")
    monkeypatch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKK")
    given = object()
    assert direct(given) is given and direct(given) is given
    (said,) = caplog.messages
    assert "launches all kernels itself" in said and "its launchers take iiiKK" in said


@pytest.mark.usefixtures("asked_again")
def test_a_triton_without_launchers_for_this_vendor_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backends: Any = pytest.importorskip("triton.backends.nvidia")
    monkeypatch.delattr(backends, "driver", raising=False)
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.driver", None)
    given = object()
    assert direct(given) is given
    assert "launches all kernels itself" in caplog.text


def test_a_descriptor_is_told_apart_by_its_tile_and_format_and_not_by_where_it_begins(kernel: Kernel) -> None:
    def descriptor(base: torch.Tensor, tile: int) -> Any:
        return SimpleNamespace(base=base, shape=[4, 16], strides=[16, 1], block_shape=[tile, 16], padding="zero")

    launcher, other = DirectKernel(kernel, kernel.readied, []), torch.ones(64, dtype=torch.bfloat16)
    for given in (descriptor(HERE, 4), descriptor(other, 4), descriptor(HERE, 2), descriptor(HERE.float(), 4)):
        launcher[1,](given, BLOCK=16)
    assert len(kernel.compiled) == 3 and len(kernel.launched) == 1
    assert kernel.launched[0][-2].base is other
