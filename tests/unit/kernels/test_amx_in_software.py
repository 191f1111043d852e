"""The kernels for AMX compute what the ops say, with the tile unit in software where the processor has none."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.cpu import amx_kernels, cache_kernels, fp8_kernels, int8_kernels, native
from agentspeed_kernels.cpu.native_kernels import OpenedFunctions
from agentspeed_kernels.fp8_cache import heads_row, latent_row
from agentspeed_kernels.packing import Weight, kept_in, pack
from agentspeed_kernels.platform import detect
from agentspeed_kernels.reference import definitions
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.testing.fused_cases import meant
from agentspeed_kernels.testing.tolerance import tolerance
from agentspeed_kernels.tiles import plan_tiles
from agentspeed_kernels.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(native.__file__).parent
MODEL = Path(__file__).with_name("tile_model.h")
STRICT = ("-Wall", "-Wextra", "-Werror")
SPECS = tuple(
    spec
    for module in (amx_kernels, cache_kernels, int8_kernels, fp8_kernels)
    for spec in module.SPECS
    if spec.features == {native.AMX.feature}
)
PAGE = 16


def built(folder: Path) -> Path:
    """The library of the form with AMX, for whichever process of the run comes first."""
    library = folder / "amx.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            entries = folder / "entries.c"
            entries.write_text(native.entries_source(native.AMX))
            sources = [path for pattern in native.AMX.sources for path in sorted(FOLDER.glob(pattern))]
            with ThreadPoolExecutor(2) as pool:
                wanted = [*sources, FOLDER / "native_scratch.c", entries]
                objects = list(pool.map(lambda source: compiled(source, folder), wanted))
            made = folder / "made.so"
            subprocess.run(["gcc", "-shared", "-fopenmp", *objects, "-lm", "-o", str(made)], check=True)
            made.rename(library)
    return library


def compiled(source: Path, folder: Path) -> str:
    flags = (*native.FLAGS, "-O1", *STRICT, *native.AMX.flags, f"-I{FOLDER}", f'-DTILE_MODEL="{MODEL}"')
    made = str(folder / f"{source.stem}.o")
    named = ("-DFORM=amx", "-DKIND=bf16", "-DHALF")
    done = subprocess.run(["gcc", *flags, *named, "-c", str(source), "-o", made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="session")
def amx(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    missing = {native.AVX512BF16.feature} - detect().features
    if missing:
        pytest.skip(f"the model of the tile unit needs {missing}")
    base = tmp_path_factory.getbasetemp()
    # Workers have a folder each in that of the run.
    return ctypes.CDLL(str(built(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)))


def on(library: ctypes.CDLL, spec: KernelSpec) -> Callable[..., Any]:
    """The call of a spec on the functions of another library."""
    method: Any = spec.call
    made = type(method.__self__)
    kernels: OpenedFunctions = made(native.AMX) if made is amx_kernels.TileKernels else made(native.AMX, "bf16")
    kernels._functions = native._opened(library, native.AMX, "bf16")
    call: Callable[..., Any] = getattr(kernels, method.__name__)
    return call


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_kernel_for_amx_keeps_its_tolerance(spec: KernelSpec, amx: ctypes.CDLL) -> None:
    modelled = replace(spec, call=on(amx, spec))
    over = {
        case.name: error
        for case in conformance.cases(modelled)
        if not (error := conformance.worst_error(modelled, case)) <= tolerance(case.op, case.dtype)
    }
    assert not over


@pytest.mark.parametrize("shape", [(1, 33, 1100), (16, 70, 1093), (20, 33, 1100), (40, 70, 1093), (100, 81, 1600)])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.op == "linear"], ids=str)
def test_inputs_that_are_cut_in_parts_give_the_whole_product(
    spec: KernelSpec, shape: tuple[int, int, int], amx: ctypes.CDLL
) -> None:
    rows, outputs, inputs = shape
    noise = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=noise).bfloat16()
    weight = (torch.randn(outputs, inputs, generator=noise) * inputs**-0.5).bfloat16()
    bias = torch.randn(outputs, generator=noise).bfloat16()
    for kind in conformance.weights_of(spec):
        laid: Weight = pack(weight) if kind is None else kept_in(weight, kind)
        out = torch.full((rows, outputs), float("nan"), dtype=torch.bfloat16)
        on(amx, spec)(x, laid, bias, out)
        wanted = definitions.linear(x, meant(weight, laid), bias)
        assert float((out.double() - wanted).abs().max() / wanted.abs().max()) < 4e-3


def products(library: ctypes.CDLL, op: str, rows: int, heads: int, groups: int, cache: str | None) -> int:
    """How many products of tiles `rows` rows take that read the same 100 tokens."""
    spec = next(spec for spec in SPECS if spec.op == op and spec.cache == (cache and frozenset({cache})))
    run = Run(
        pages=np.arange(7, dtype=np.int32), start=0, tokens=100, queries=np.arange(rows, dtype=np.int32), causal=False
    )
    tiles = plan_tiles([run], np.full(rows, 100), page_tokens=PAGE, chunk_tokens=64, block_rows=32)
    rank, width = 64, 64
    row = latent_row(rank, 32) if op == "mla_rows" else None
    count = ctypes.c_long.in_dll(library, "tile_products")
    before = count.value
    if row is not None:
        numbers = torch.randn(7, PAGE, rank + 32).bfloat16()
        pools = [row.coded(numbers) if cache else numbers]
        q, out = torch.randn(rows, heads, rank + 32).bfloat16(), torch.empty(rows, heads, rank, dtype=torch.bfloat16)
    else:
        pools = [torch.randn(7, PAGE, groups * width).bfloat16() for _ in ("keys", "values")]
        pools = [heads_row(groups, width).coded(pool) if cache else pool for pool in pools]
        q, out = (torch.randn(rows, heads, width).bfloat16() for _ in range(2))
    on(library, spec)(q, *pools, tiles, 0.1, Workspace(), out)
    return count.value - before


@pytest.mark.parametrize("cache", [None, "fp8"])
@pytest.mark.parametrize(
    ("op", "rows", "heads", "groups", "tiled"),
    [
        ("gqa_rows", 1, 16, 8, False),
        ("gqa_rows", 2, 16, 8, False),
        ("gqa_rows", 3, 16, 8, True),
        ("gqa_rows", 1, 40, 8, True),
        ("gqa_rows", 8, 16, 8, True),
        ("mla_rows", 1, 2, 1, False),
        ("mla_rows", 1, 3, 1, True),
        ("mla_rows", 1, 8, 1, True),
    ],
)
def test_few_queries_of_a_head_run_on_vectors_and_more_on_tiles(
    op: str, rows: int, heads: int, groups: int, tiled: bool, cache: str | None, amx: ctypes.CDLL
) -> None:
    assert (products(amx, op, rows, heads, groups, cache) > 0) == tiled
