"""Eight turns of one session against transformers with its cache: time per session, and whether the tokens agree.

    python bench/turns.py

A 2048-token system prompt, then 8 turns of +200 tokens in and 50 out, greedy, float32, one session. Both sides keep
their cache from turn to turn, run in one process after each other with the same threads and the same malloc settings,
and are timed from ids to ids. transformers is fed the tokens that agentspeed drew (its own draw is compared, not
followed), so one near-tie does not end the comparison. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]
MALLOC = {
    # Fresh large tensors fault in every page again unless glibc keeps them; both sides gain from keeping them.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
NEAR_TIE = 1e-4
"""Share of the logits' spread under which the two best count as a tie in float32."""


@dataclass(slots=True)
class Side:
    """What one engine did."""

    seconds_by_turn: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    ids: list[int] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    """One [vocab] tensor per drawn token."""

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_turn)


def main() -> None:
    arguments = parse_arguments()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    import torch

    torch.set_num_threads(arguments.threads)
    checkpoint = prepare(arguments)
    inputs = prompts(arguments)
    ours = run_agentspeed(checkpoint, inputs, arguments)
    theirs = run_transformers(checkpoint, inputs, ours.ids, arguments)
    report(ours, theirs, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "bench/models/v3-50m.json")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system", type=int, default=2048, help="tokens of the system prompt")
    parser.add_argument("--new", type=int, default=200, help="tokens in per turn")
    parser.add_argument("--out", type=int, default=50, help="tokens out per turn")
    parser.add_argument("--chunk", type=int, default=512, help="most tokens of one prefill step")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace) -> Path:
    """The random checkpoint of the configuration, written once."""
    from tools.random_checkpoint import make_checkpoint

    out = ROOT / ".checkpoints" / f"{arguments.config.stem}-{arguments.seed}"
    if not (out / "tokenizer_config.json").exists():
        make_checkpoint(json.loads(arguments.config.read_text()), out, arguments.seed)
    return out


def prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Ids of byte tokens for every turn; the first holds the system prompt too."""
    import numpy as np

    draw = np.random.default_rng(arguments.seed)
    sizes = [arguments.system + arguments.new, *[arguments.new] * (arguments.turns - 1)]
    return [draw.integers(0, 256, size).tolist() for size in sizes]


def run_agentspeed(checkpoint: Path, inputs: list[list[int]], arguments: argparse.Namespace) -> Side:
    """The model runner alone, with pages handed out in order: the engine's own cost is bench/sched.py's matter."""
    import numpy as np
    from agentspeed_engine.models.catalog import load
    from agentspeed_engine.models.inputs import FlatBatch, Run

    page_tokens, context = 64, sum(len(ids) for ids in inputs) + arguments.turns * arguments.out
    pages = np.arange(context // page_tokens + 1, dtype=np.int32)
    model = load(checkpoint, dtype="float32", pages=len(pages), page_tokens=page_tokens, threads=arguments.threads)
    known = 0

    def forward(ids: list[int]) -> Any:
        nonlocal known
        positions = np.arange(known, known + len(ids), dtype=np.int64)
        known += len(ids)
        tail = Run(
            pages=pages[: -(-known // page_tokens)],
            start=0,
            tokens=known,
            queries=np.arange(len(ids), dtype=np.int32),
            causal=True,
        )
        batch = FlatBatch(
            ids=np.array(ids, dtype=np.int64),
            positions=positions,
            slots=positions,
            runs=(tail,),
            select=np.array([len(ids) - 1], dtype=np.int64),
        )
        return model.forward(batch)[0]

    def prefill(ids: list[int]) -> Any:
        logits: Any = None
        for at in range(0, len(ids), arguments.chunk):
            logits = forward(ids[at : at + arguments.chunk])
        return logits

    prefill(inputs[0][:8])
    known = 0
    return drive("agentspeed", inputs, arguments.out, prefill, lambda token: forward([token]), None)


def run_transformers(
    checkpoint: Path, inputs: list[list[int]], followed: list[int], arguments: argparse.Namespace
) -> Side:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    cache = transformers.DynamicCache(config=model.config)

    @torch.inference_mode()
    def forward(ids: list[int]) -> Any:
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    with torch.inference_mode():
        model(torch.tensor([inputs[0][:8]]))
    return drive("transformers", inputs, arguments.out, forward, lambda token: forward([token]), followed)


def drive(
    name: str,
    inputs: list[list[int]],
    out: int,
    prefill: Callable[[list[int]], Any],
    decode: Callable[[int], Any],
    followed: list[int] | None,
) -> Side:
    """One session: each turn feeds the last drawn token with the new ones, then draws `out` tokens greedily."""
    side = Side()
    pending: list[int] = []
    for turn, new in enumerate(inputs):
        started = time.perf_counter()
        logits = prefill(pending + new)
        filled = time.perf_counter()
        for index in range(out):
            drawn = int(logits.argmax())
            side.logits.append(logits)
            side.ids.append(drawn)
            token = drawn if followed is None else followed[len(side.ids) - 1]
            if index + 1 < out:
                logits = decode(token)
        pending = [token]
        ended = time.perf_counter()
        side.prefill_seconds += filled - started
        side.decode_seconds += ended - filled
        side.seconds_by_turn.append(ended - started)
        print(f"{name} turn {turn + 1}: prefill {filled - started:.2f} s, decode {ended - filled:.2f} s", flush=True)
    return side


def report(ours: Side, theirs: Side, arguments: argparse.Namespace) -> None:
    compared, ties, unequal, worst = compare(ours, theirs)
    drawn = arguments.turns * (arguments.out - 1)
    figures = {
        "bench": "turns",
        "config": arguments.config.stem,
        "path": "model runner",
        "threads": arguments.threads,
        "seconds": round(ours.seconds, 3),
        "transformers_seconds": round(theirs.seconds, 3),
        "speedup_vs_transformers": round(theirs.seconds / ours.seconds, 2),
        "prefill_seconds": round(ours.prefill_seconds, 3),
        "transformers_prefill_seconds": round(theirs.prefill_seconds, 3),
        "decode_tokens_per_second": round(drawn / ours.decode_seconds, 1),
        "transformers_decode_tokens_per_second": round(drawn / theirs.decode_seconds, 1),
        "tokens_equal": int(unequal == 0),
        "tokens_compared": compared,
        "near_ties": ties,
        "logits_worst_relative": worst,
    }
    print(json.dumps(figures))


def compare(ours: Side, theirs: Side) -> tuple[int, int, int, float]:
    """(positions compared, near-ties left out, unequal tokens, worst max|d| / max|logit|)"""
    compared = ties = unequal = 0
    worst = 0.0
    for mine, reference in zip(ours.logits, theirs.logits, strict=True):
        best, second = reference.topk(2).values.tolist()
        spread = float(reference.max() - reference.min())
        worst = max(worst, float((mine - reference).abs().max() / reference.abs().max()))
        if best - second < NEAR_TIE * spread:
            ties += 1
            continue
        compared += 1
        unequal += int(mine.argmax() != reference.argmax())
    return compared, ties, unequal, worst


if __name__ == "__main__":
    main()
