"""Fixtures that every kind of test may use: the event loops the SDK promises to run on, and a small checkpoint."""

from __future__ import annotations

import os

# Triton reads it when it is first imported, by whoever: the kernels' numbers are tested through its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
# As engines have it (serve/tuning.py): workers that share two cores would burn them in barriers. Read with torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Many processes of this checkout start in a run; without bytecode each compiles the same modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.loops import LOOPS
from tests.support.random_checkpoint import make_checkpoint

sys.dont_write_bytecode = False
ROOT = Path(__file__).resolve().parent.parent
# How long an example takes says how busy the machine is.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


def pytest_sessionstart() -> None:
    """What collecting loads stays to the end, so nothing is garbage until then."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Torch, transformers and all tests are some million objects: a collection in the middle of a test, of which there
    are thousands in a run, does not walk over them."""
    _ = gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


@pytest.fixture(params=LOOPS.values(), ids=LOOPS.keys())
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Every `@pytest.mark.anyio` test runs on each of these."""
    return request.param


@pytest.fixture(autouse=True)
def import_path() -> Iterator[None]:
    """The import path as it was before the test: a folder of a test's own modules hides nothing in a later one."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of torch: teams of threads on busy cores wait for each other, and what they compute is tested by itself."""
    # Imported late: most tests need no tensors.
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Engines of tests are listed, and leave what a crash leaves, in folders of the tests, not among the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runtime")
        patch.setenv("AGENTSPEED_RUNTIME_DIR", str(folder))
        patch.setenv("AGENTSPEED_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random `deepseek_v3` folder with two small layers: real ids, meaningless text."""
    config = json.loads((ROOT / "bench/models/tiny.json").read_text())
    yield make_checkpoint(config, tmp_path_factory.mktemp("tiny") / "model")
