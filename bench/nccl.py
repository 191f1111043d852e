"""One model on two GPUs against one: the same workload must draw the same tokens over NCCL. Untried: nobody has run it.

Run on a machine with two GPUs: `python bench/nccl.py [--tp 2]`. The last line is JSON: `tokens_equal` is 1 when every
turn of the workload (forks, rewinds, preemptions, a grammar, host copies) drew the same in float64 on `tp` GPUs and on
one, `logprob_gap` the largest difference of their log-probabilities, `seconds` what each took.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

from tests.support.engine_client import engine
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint
from tests.support.rank_workload import OPTIONS, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    arguments = parser.parse_args()
    turns: dict[int, list[tuple[list[int], list[float]]]] = {}
    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(CONFIG, Path(scratch) / "model", seed=3, dtype="float64")
        for tp in (1, arguments.tp):
            place = Path(scratch) / f"tp{tp}"
            place.mkdir()
            with engine(place, model=str(folder), tp=tp, **OPTIONS | {"device": "cuda"}) as process:
                front = process.connect()
                started = time.perf_counter()
                turns[tp] = drawn(front)
                seconds[tp] = time.perf_counter() - started
    one, several = turns[1], turns[arguments.tp]
    gaps = [
        abs(mine - theirs)
        for left, right in zip(one, several, strict=True)
        for mine, theirs in zip(left[1], right[1], strict=False)
    ]
    line = {
        "tokens_equal": int([ids for ids, _ in one] == [ids for ids, _ in several]),
        "logprob_gap": max(gaps),
        "seconds": {str(tp): round(spent, 2) for tp, spent in seconds.items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
