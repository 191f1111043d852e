"""What batch invariance costs on a CPU: steps of one thread with and without it, in turns.

    python bench/invariant.py [--model FOLDER] [--dtype float32] [--rounds 9]

Milliseconds of processor time of one thread, medians; the model is the shipped one when left out. On a GPU it is
`bench/gpu.py --sections invariant`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from agentspeed.engine import NANO
from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.loaded import LoadedModel
from tests.support.paged import Trail, batch

PAGE, CONTEXT, PROMPT = 64, 1024, 512
OWN = CONTEXT // PAGE + 1
SETTLE = 5
"""Steps of a shape before it is timed: they are recorded after some."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(NANO))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    both = [
        load(given.model, dtype=given.dtype, pages=32 * OWN, page_tokens=PAGE, threads=1, batch_invariant=invariant)
        for invariant in (False, True)
    ]
    cases: dict[str, Callable[[], FlatBatch]] = {
        "1 row at 1 k": lambda: decode(1),
        "32 rows at 1 k": lambda: decode(32),
        "a prompt of 512": lambda: batch(PAGE, [(Trail(PAGE, list(range(OWN))), ids(PROMPT))], select="last"),
    }
    print(f"{'step':20}{'without':>12}{'with':>12}{'times':>8}")
    for label, step in cases.items():
        without, with_it = medians(both, step, given.rounds)
        print(f"{label:20}{without:9.2f} ms{with_it:9.2f} ms{with_it / without:8.2f}", flush=True)
    return 0


def medians(models: list[LoadedModel], step: Callable[[], FlatBatch], rounds: int) -> list[float]:
    """Milliseconds of each model, whose rounds take turns."""
    taken: list[list[float]] = [[] for _ in models]
    for number in range(SETTLE + rounds):
        for model, times in zip(models, taken, strict=True):
            given = step()
            started = time.process_time()
            _ = model.forward(given)
            if number >= SETTLE:
                times.append(1e3 * (time.process_time() - started))
    return [statistics.median(times) for times in taken]


def decode(rows: int) -> FlatBatch:
    """Branches that share nothing; what they read is what the pool holds."""
    trails = [Trail(PAGE, list(range(OWN * row, OWN * row + OWN)), known=CONTEXT) for row in range(rows)]
    return batch(PAGE, [(trail, ids(1)) for trail in trails])


def ids(count: int) -> list[int]:
    found: list[int] = (np.arange(count) * 31 % 1000 + 3).tolist()
    return found


if __name__ == "__main__":
    sys.exit(main())
