"""Of rows that no query sees, the kernels of a GPU need numbers in those behind the last token of a page that they
read, and nowhere else: what a step clears (`exec.hidden_rows`) is enough. Through the interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_kernels.testing import conformance
from agentspeed_kernels.triton import attention, backend, extend, grouped
from agentspeed_kernels.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
"""The interpreter computes both sides of a `where`."""

CPU = torch.device("cpu")
PAGE, WIDTH, ROPE, HEADS, GROUPS, PAGES, NEW = 16, 32, 16, 4, 2, 8, 5
Attends = Callable[[Tensor, Tensor], Tensor]
TRUNK, TAIL, TOKENS = np.array([6, 2], np.int32), np.array([4, 1], np.int32), 20
"""A trunk of two full pages, and a tail whose last page has 4 tokens."""


def path() -> tuple[list[conformance.Piece], np.ndarray]:
    """The last tokens of one branch are new."""
    rows = np.arange(NEW, dtype=np.int32)
    pieces = [
        conformance.piece(TRUNK, 0, 2 * PAGE, rows, False),
        conformance.piece(TAIL, 2 * PAGE, TOKENS, rows, True),
    ]
    return pieces, np.arange(NEW) + 2 * PAGE + TOKENS - NEW


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def latent_rows(pool: Tensor, _: Tensor) -> Tensor:
    shape = backend.shape_of(HEADS, WIDTH, ROPE, PAGE, CPU, 4)
    out = torch.full((NEW, HEADS, WIDTH), float("nan"))
    step = attention.prepare(*path(), shape, CPU)
    attention.mla_rows(noise(NEW, HEADS, WIDTH + ROPE), pool, step, 0.2, Workspace(), out)
    return out


def latent_extend(pool: Tensor, _: Tensor) -> Tensor:
    out, step = torch.full((NEW, HEADS, 24), float("nan")), extend.prepare_extend(*path(), PAGE, HEADS, CPU)
    up = noise(HEADS, WIDTH, 8), noise(HEADS, 24, WIDTH)
    extend.mla_extend(noise(NEW, HEADS, 8 + ROPE), pool, *up, step, 0.2, Workspace(), out)
    return out


def grouped_rows(keys: Tensor, values: Tensor) -> Tensor:
    shape = backend.grouped_shape_of(HEADS, GROUPS, 24, PAGE, CPU, 4)
    out = torch.full((NEW, HEADS, 24), float("nan"))
    grouped.gqa_rows(noise(NEW, HEADS, 24), keys, values, attention.prepare(*path(), shape, CPU), 0.2, Workspace(), out)
    return out


def grouped_extend(keys: Tensor, values: Tensor) -> Tensor:
    out, step = torch.full((NEW, HEADS, 24), float("nan")), extend.prepare_extend(*path(), PAGE, HEADS, CPU)
    grouped.gqa_extend(noise(NEW, HEADS, 24), keys, values, step, 0.2, Workspace(), out)
    return out


@pytest.mark.parametrize("attends", [latent_rows, latent_extend, grouped_rows, grouped_extend])
def test_rows_behind_the_last_token_of_a_page_are_all_that_must_hold_numbers(attends: Attends) -> None:
    def found(elsewhere: float) -> Tensor:
        pools = [torch.full((PAGES, PAGE, 48), elsewhere) for _ in range(2)]
        for number, pool in enumerate(pools):
            held = noise(4, PAGE, 48, number + 1)[..., number]
            pool[[*TRUNK.tolist(), *TAIL.tolist()]] = held
            pool[TAIL[-1], TOKENS % PAGE :] = 0
        return attends(*pools)

    with_numbers, without = found(0.5), found(float("nan"))
    assert bool(torch.isfinite(without).all())
    assert torch.equal(without, with_numbers)
