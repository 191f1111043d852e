"""What a pause costs: time to the first token of a resumed session against that of a session that starts anew.

    python bench/resume.py

One session of 8192 tokens on the 50 M configuration gets 100 new tokens and draws one; a second, `private` session (it
shares nothing) is given all 8292 ids at once. Both are timed by the front, through the socket of a real engine process,
best of several interleaved repeats. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

from agentspeed_engine.protocol.messages import TurnUsage
from tests.support.engine_client import Front, engine
from tests.support.random_checkpoint import make_checkpoint


def main() -> None:
    options = parse_arguments()
    config = json.loads(options.config.read_text())
    draw = random.Random(options.seed)
    ids = [draw.randrange(config["vocab_size"]) for _ in range(options.context)]
    fulls, resumes = [], []
    recomputed = 0
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(config, Path(scratch) / "model")
        pages = 3 * (options.context + options.new) // 64 + 64
        with engine(
            Path(scratch),
            model=str(checkpoint),
            pages=pages,
            threads=options.threads,
            context_limit=options.context + 2 * options.new * (options.repeats + 2),
        ) as process:
            front = process.connect()
            session = front.open(ids)
            front.generate(session, max_tokens=0)
            mark = front.rewind(session, len(ids))
            for repeat in range(options.repeats):
                new = [draw.randrange(config["vocab_size"]) for _ in range(options.new)]
                seconds, usage = first_token(front, session, new)
                resumes.append(seconds)
                recomputed += usage.recomputed
                if usage.new != options.new + (repeat == 0):  # a prefill-only turn leaves one token to feed
                    raise SystemExit(f"the resumed turn computed {usage.new} new ids, not {options.new}")
                front.rewind(session, mark)
                fresh = front.open(private=True)
                seconds, usage = first_token(front, fresh, ids + new)
                fulls.append(seconds)
                if usage.new != len(ids) + options.new:
                    raise SystemExit(f"the full prefill computed {usage.new} of {len(ids) + options.new} ids")
                front.end(fresh)
                print(f"repeat {repeat}: resume {resumes[-1] * 1e3:.1f} ms, full prefill {fulls[-1] * 1e3:.0f} ms")
    figures = {
        "recomputed_tokens": recomputed,
        "ttft_ratio": round(min(fulls) / min(resumes), 1),
        "ttft_ratio_median": round(statistics.median(fulls) / statistics.median(resumes), 1),
        "resume_ms": round(min(resumes) * 1e3, 1),
        "prefill_ms": round(min(fulls) * 1e3, 1),
        "context": options.context,
        "new": options.new,
        "threads": options.threads,
    }
    print(
        f"recomputed_tokens {figures['recomputed_tokens']} (must be 0), "
        f"ttft_ratio {figures['ttft_ratio']} (must be >= 15)"
    )
    print(json.dumps(figures))


def first_token(front: Front, branch: int, ids: list[int]) -> tuple[float, TurnUsage]:
    """Seconds from asking to the turn's only token, and what the turn cost."""
    started = time.perf_counter()
    turn = front.generate(branch, ids, max_tokens=1)
    seconds = time.perf_counter() - started
    assert turn.ended is not None and len(turn.ids) == 1
    return seconds, turn.ended.usage


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "bench/models/v3-50m.json")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
