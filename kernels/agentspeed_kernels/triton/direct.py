"""Launches of kernels that are compiled already, straight to the driver: Triton's own way there costs a step's time.

For every launch Triton binds arguments by name, asks what each is specialised on, makes text of all that to look the
kernel up by, and calls hooks that nobody has set: 20 to 35 microseconds of Python, some 600 times a step. Here a launch
is looked up by all that the compiler specialises on; the first of its kind, and whatever is not understood, goes
through Triton, which compiles it, checks where its tensors lie, and gives the kernel that others are launched of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias, final

from torch import Tensor

log = logging.getLogger("agentspeed.kernels")

Grid: TypeAlias = tuple[int, ...]
_LAUNCHER = "iiiKKppOOOOOO"
"""What the launchers of Triton that are known here take before a kernel's own arguments."""
_INT32 = 1 << 31
_INT64 = 1 << 63


@final
@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A kernel on one device as its launcher wants it."""

    launch: Callable[..., None]
    function: int
    cooperative: bool
    early: bool
    metadata: Any
    stream: Callable[[int], int]
    device: int
    constants: tuple[Any, ...]
    """They follow the other arguments, in the order of the kernel's parameters."""


@final
class DirectKernel:
    """A kernel under `[grid](*arguments, **constants)`, as Triton has it."""

    __slots__ = ("_kernel", "_readied", "_ready", "_watched")

    def __init__(
        self, kernel: Any, readied: Callable[[Any, Any, int, int, dict[str, Any]], Ready | None], watched: object
    ) -> None:
        """`readied(compiled, kernel, device, count of arguments, constants)`: None for what only Triton launches.
        `watched`: hooks that want to hear of every launch; as long as it is true, Triton makes all launches."""
        self._kernel, self._readied, self._watched = kernel, readied, watched
        self._ready: dict[tuple[Any, ...], Ready | None] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Grid, *arguments: Any, **constants: Any) -> None:
        key, values = specialised(arguments)
        if key is None or self._watched:
            self._kernel[grid](*arguments, **constants)
            return
        key = (*key, *constants, *constants.values())
        ready = self._ready.get(key)
        if ready is None:
            compiled = self._kernel[grid](*arguments, **constants)
            if key not in self._ready:
                device = next((one.get_device() for one in arguments if isinstance(one, Tensor)), -1)
                self._ready[key] = self._readied(compiled, self._kernel, device, len(arguments), constants)
            return
        x, y, z = (*grid, 1, 1)[:3]
        ready.launch(
            x, y, z, ready.stream(ready.device), ready.function, ready.cooperative, ready.early, None, None,
            ready.metadata, None, None, None, *values, *ready.constants,
        )  # fmt: skip


def specialised(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """(All that a compiler may specialise on, None where an argument is of a kind that is not known here; the arguments
    as a launcher takes them.) Equal keys: the same compiled kernel, on the same device."""
    key: list[Any] = []
    values: list[Any] = []
    for one in arguments:
        kind = type(one)
        if kind is Tensor:
            at = one.data_ptr()
            key += (one.dtype, one.get_device(), at & 15 == 0)
            values.append(at)
            continue
        if kind is int:
            if not -_INT64 <= one < _INT64:
                return None, values
            # One is a constant to the compiler; multiples of 16 and numbers of 32 bits are types of their own.
            key.append("one" if one == 1 else (one & 15 == 0, -_INT32 <= one < _INT32))
        elif kind is float:
            key.append("float")
        elif hasattr(one, "block_shape") and isinstance(getattr(one, "base", None), Tensor):
            base = one.base
            key += (kind, base.dtype, base.get_device(), tuple(one.block_shape), getattr(one, "layout", None))
            key += (one.padding, len(one.shape), base.data_ptr() & 15 == 0)
        else:
            return None, values
        values.append(one)
    return tuple(key), values


def direct(kernel: Any) -> Any:
    """The kernel under direct launches, where Triton is one whose launchers are known, else as it is."""
    found = launched_directly()
    if found is None or not isinstance(kernel, found[0]):
        return kernel
    return DirectKernel(kernel, _readied, found[1])


@cache
def launched_directly() -> tuple[type[Any], Hooks] | None:
    """(The class of kernels that are compiled, hooks of launches); None, with a warning: a Triton that is not known
    here."""
    import triton

    try:
        from triton.backends.nvidia import driver
        from triton.knobs import runtime
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        why = str(error)
    else:
        takes = getattr(driver, "_BASE_ARGS_FORMAT", None)
        if takes == _LAUNCHER:
            return JITFunction, Hooks(runtime)
        why = f"its launchers take {takes}, and those that are known {_LAUNCHER}"
    log.warning("Triton %s launches all kernels itself, which makes steps slower: %s", triton.__version__, why)
    return None


@final
class Hooks:
    """Those of Triton's `knobs.runtime`, as they are when it is asked: a profiler adds one, or puts another chain in
    their place."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __bool__(self) -> bool:
        return _hooked(self._runtime.launch_enter_hook) or _hooked(self._runtime.launch_exit_hook)


def _hooked(chain: Any) -> bool:
    """What is no chain of Triton's may do anything."""
    return chain is not None and bool(getattr(chain, "calls", True))


def _readied(compiled: Any, kernel: Any, device: int, count: int, constants: dict[str, Any]) -> Ready | None:
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver

    active: Any = driver.active
    run = getattr(compiled, "run", None)
    if not isinstance(run, CudaLauncher) or run.global_scratch_size or run.profile_scratch_size or device < 0:
        return None
    if kernel.pre_run_hooks or active.get_current_device() != device:
        return None
    rest = kernel.params[count:]
    if any(one.is_constexpr for one in kernel.params[:count]) or not all(one.is_constexpr for one in rest):
        return None
    return Ready(
        launch=run.launch,
        function=compiled.function,
        cooperative=run.launch_cooperative_grid,
        early=run.launch_pdl,
        metadata=compiled.packed_metadata,
        stream=active.get_current_stream,
        device=device,
        constants=tuple(constants.get(one.name, one.default) for one in rest),
    )
