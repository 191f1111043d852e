"""Eight simultaneous sessions with the same cold prefix: how often its full pages are computed.

    python bench/cold_siblings.py

Each session is given the 4096 shared tokens and one of its own, all at once, through a real engine process.
What counts are the rows of all steps, as the engine's loop sent them to the worker. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

from tests.support.engine_client import TurnRecord, engine
from tests.support.random_checkpoint import make_checkpoint


def main() -> None:
    options = parse_arguments()
    config = json.loads(options.config.read_text())
    draw = random.Random(options.seed)
    prefix = [draw.randrange(config["vocab_size"]) for _ in range(options.prefix)]
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(config, Path(scratch) / "model")
        pages = 4 * (options.prefix // options.page_tokens) + 4 * options.sessions
        with engine(
            Path(scratch),
            model=str(checkpoint),
            pages=pages,
            page_tokens=options.page_tokens,
            threads=options.threads,
            context_limit=2 * options.prefix,
        ) as process:
            front = process.connect()
            branches = [front.open() for _ in range(options.sessions)]
            turns = [front.start(branch, [*prefix, number], max_tokens=1) for number, branch in enumerate(branches)]
            front.finish(*turns)
            counts = front.counts()
    shared = options.prefix // options.page_tokens * options.page_tokens
    own = options.sessions * (options.prefix + 1 - shared)
    figures = {
        "prefill_tokens_per_shared_token": round((counts["rows_computed"] - own) / shared, 4),
        "rows_computed": counts["rows_computed"],
        "sessions": options.sessions,
        "prefix": options.prefix,
        "new_and_not_shared_by_session": [new_rows(turn) for turn in turns],
        "pages_of_prefix": shared // options.page_tokens,
        "pages_in_nodes": counts["pages_nodes"],
    }
    print(f"prefill_tokens_per_shared_token {figures['prefill_tokens_per_shared_token']} (must be 1.0)")
    print(json.dumps(figures))


def new_rows(turn: TurnRecord) -> int:
    """What the turn says of itself."""
    assert turn.ended is not None
    return turn.ended.usage.new - turn.ended.usage.shared


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "bench/models/tiny.json")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=4096)
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
