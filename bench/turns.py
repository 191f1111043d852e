"""Eight turns of one session against transformers with its cache: time per session, and whether the tokens agree.

    python bench/turns.py                # through the public SDK: Session, engine process, socket, scheduler
    python bench/turns.py --path runner  # the model runner alone, without an engine around it

A system prompt of 2048 tokens, then 8 turns of +200 tokens in and 50 out, greedy, float32, one session. Both sides keep
their cache from turn to turn, run after each other with the same threads and the same malloc settings, and are timed
from prompt to last token. transformers is fed the ids of the session (its own draw is compared, not followed), so one
near-tie does not end the comparison. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]
from agentspeed_engine.serve.tuning import MALLOC

NEAR_TIE = 1e-4
"""Share of the logits' spread under which the two best count as a tie in float32."""


@dataclass(slots=True)
class Side:
    """What one engine did."""

    seconds: list[float] = field(default_factory=list)
    """By turn."""
    first_seconds: list[float] = field(default_factory=list)
    """By turn, until the first token."""
    prompts: list[list[int]] = field(default_factory=list)
    """By turn: the ids that are new to the cache, the last drawn one of the turn before included."""
    drawn: list[list[int]] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    """One [vocab] tensor per drawn token."""

    def add(self, name: str, prompt: list[int], drawn: list[int], first: float, whole: float) -> None:
        self.prompts.append(prompt)
        self.drawn.append(drawn)
        self.first_seconds.append(first)
        self.seconds.append(whole)
        print(
            f"{name} turn {len(self.seconds)}: {len(prompt)} in, {len(drawn)} out, "
            f"first token {first:.2f} s, the others {whole - first:.2f} s",
            flush=True,
        )

    @property
    def decode_rate(self) -> float:
        return sum(len(ids) - 1 for ids in self.drawn) / (sum(self.seconds) - sum(self.first_seconds))


def main() -> None:
    arguments = parse_arguments()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    import torch

    torch.set_num_threads(arguments.threads)
    checkpoint = prepare(arguments)
    if arguments.path == "sdk":
        ours = asyncio.run(run_sdk(checkpoint, arguments))
    else:
        ours = run_runner(checkpoint, arguments)
    theirs = run_transformers(checkpoint, ours)
    ours.logits = logits_of(checkpoint, ours, arguments)
    report(ours, theirs, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "bench/models/v3-50m.json")
    parser.add_argument("--path", choices=("sdk", "runner"), default="sdk")
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
    from tests.support.random_checkpoint import make_checkpoint

    out = ROOT / ".checkpoints" / f"{arguments.config.stem}-{arguments.seed}"
    if not (out / "tokenizer_config.json").exists():
        make_checkpoint(json.loads(arguments.config.read_text()), out, arguments.seed)
    return out


def texts(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """System prompt and user messages of capitals, each one token; 4 ids a message are the template's."""
    import random

    draw = random.Random(arguments.seed)

    def text(tokens: int) -> str:
        return "".join(draw.choices(ascii_uppercase, k=tokens))

    return text(arguments.system - 3), [text(arguments.new - 4) for _ in range(arguments.turns)]


async def run_sdk(checkpoint: Path, arguments: argparse.Namespace) -> Side:
    """What a user writes, an engine process and its socket included."""
    from agentspeed import Engine

    side = Side()
    system, messages = texts(arguments)
    async with Engine(checkpoint, dtype="float32", threads=arguments.threads, prefill_chunk=arguments.chunk) as engine:
        async with engine.session() as warm:
            await warm.generate("WARM", max_tokens=2)
        async with engine.session(system=system) as session:
            fed = 0
            for message in messages:
                started = time.perf_counter()
                reply = await session.generate(message, max_tokens=arguments.out)
                whole = time.perf_counter() - started
                prompt = list(session.ids[fed : session.tokens - len(reply.ids)])
                side.add("agentspeed", prompt, list(reply.ids), whole - reply.usage.decode_seconds, whole)
                fed = session.tokens - 1
    return side


class Runner:
    """The model runner with pages handed out in order, for one session."""

    def __init__(self, checkpoint: Path, context: int, arguments: argparse.Namespace) -> None:
        import numpy as np

        from agentspeed_engine.models.catalog import load

        page_tokens = 64
        self._pages = np.arange(-(-context // page_tokens), dtype=np.int32)
        self._model = load(checkpoint, dtype="float32", pages=len(self._pages), threads=arguments.threads)
        self._chunk = arguments.chunk
        self.known = 0

    def feed(self, ids: list[int], select: list[int]) -> Any:
        """Logits of the selected rows of the last chunk of `ids`; `select` counts from that chunk's start."""
        logits: Any = None
        for at in range(0, len(ids), self._chunk):
            chunk = ids[at : at + self._chunk]
            logits = self._step(chunk, select if at + self._chunk >= len(ids) else [])
        return logits

    def _step(self, ids: list[int], select: list[int]) -> Any:
        import numpy as np

        from agentspeed_engine.models.inputs import FlatBatch, Run

        positions = np.arange(self.known, self.known + len(ids), dtype=np.int64)
        self.known += len(ids)
        queries = np.arange(len(ids), dtype=np.int32)
        pages = self._pages[: -(-self.known // 64)]
        tail = Run(pages=pages, start=0, tokens=self.known, queries=queries, causal=True)
        chosen = np.array([row % len(ids) for row in select], dtype=np.int64)
        return self._model.forward(
            FlatBatch(ids=np.array(ids, np.int64), positions=positions, slots=positions, runs=(tail,), select=chosen)
        )


def run_runner(checkpoint: Path, arguments: argparse.Namespace) -> Side:
    """No engine around the model: random ids in, greedy ids out."""
    import random

    draw = random.Random(arguments.seed)
    sizes = [arguments.system + arguments.new, *[arguments.new] * (arguments.turns - 1)]
    runner = Runner(checkpoint, sum(sizes) + arguments.turns * arguments.out, arguments)
    runner.feed(list(range(8)), [-1])
    runner.known = 0
    side = Side()
    pending: list[int] = []
    for size in sizes:
        prompt = [*pending, *(draw.randrange(256) for _ in range(size))]
        started = time.perf_counter()
        drawn = [int(runner.feed(prompt, [-1])[0].argmax())]
        first = time.perf_counter() - started
        while len(drawn) < arguments.out:
            drawn.append(int(runner.feed(drawn[-1:], [-1])[0].argmax()))
        side.add("agentspeed", prompt, drawn, first, time.perf_counter() - started)
        pending = drawn[-1:]
    return side


def run_transformers(checkpoint: Path, ours: Side) -> Side:
    """The same ids turn by turn, with a cache that is kept; draws greedily but follows what the session drew."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    cache = transformers.DynamicCache(config=model.config)

    @torch.inference_mode()
    def forward(ids: list[int]) -> Any:
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    with torch.inference_mode():
        model(torch.tensor([list(range(8))]))
    side = Side()
    for prompt, followed in zip(ours.prompts, ours.drawn, strict=True):
        started = time.perf_counter()
        side.logits.append(forward(prompt))
        drawn = [int(side.logits[-1].argmax())]
        first = time.perf_counter() - started
        for token in followed[:-1]:
            side.logits.append(forward([token]))
            drawn.append(int(side.logits[-1].argmax()))
        side.add("transformers", prompt, drawn, first, time.perf_counter() - started)
    return side


def logits_of(checkpoint: Path, ours: Side, arguments: argparse.Namespace) -> list[Any]:
    """At every drawn position, computed again in this process and not timed: a session does not give all logits."""
    turns = list(zip(ours.prompts, ours.drawn, strict=True))
    runner = Runner(checkpoint, sum(len(prompt) + len(drawn) for prompt, drawn in turns), arguments)
    logits: list[Any] = []
    for prompt, drawn in turns:
        logits.append(runner.feed(prompt, [-1])[0])
        logits.extend(runner.feed(drawn[:-1], list(range(len(drawn) - 1))))
    return logits


def report(ours: Side, theirs: Side, arguments: argparse.Namespace) -> None:
    compared, ties, unequal, worst = compare(ours, theirs)
    figures = {
        "bench": "turns",
        "config": arguments.config.stem,
        "path": arguments.path,
        "threads": arguments.threads,
        "turns": arguments.turns,
        "tokens_in": sum(len(ids) for ids in ours.prompts),
        "tokens_out": sum(len(ids) for ids in ours.drawn),
        "seconds": round(sum(ours.seconds), 3),
        "transformers_seconds": round(sum(theirs.seconds), 3),
        "speedup_vs_transformers": round(sum(theirs.seconds) / sum(ours.seconds), 2),
        "first_token_seconds": round(sum(ours.first_seconds), 3),
        "transformers_first_token_seconds": round(sum(theirs.first_seconds), 3),
        "decode_tokens_per_second": round(ours.decode_rate, 1),
        "transformers_decode_tokens_per_second": round(theirs.decode_rate, 1),
        "tokens_equal": int(unequal == 0),
        "tokens_compared": compared,
        "near_ties": ties,
        "logits_worst_relative": float(f"{worst:.2e}"),
    }
    print(json.dumps(figures))


def compare(ours: Side, theirs: Side) -> tuple[int, int, int, float]:
    """(positions compared, near-ties left out, unequal tokens, worst max|d| / max|logit|)"""
    compared = ties = unequal = 0
    worst = 0.0
    drawn = [token for turn in ours.drawn for token in turn]
    for token, mine, reference in zip(drawn, ours.logits, theirs.logits, strict=True):
        best, second = reference.topk(2).values.tolist()
        spread = float(reference.max() - reference.min())
        worst = max(worst, float((mine - reference).abs().max() / reference.abs().max()))
        if best - second < NEAR_TIE * spread:
            ties += 1
            continue
        compared += 1
        unequal += int(token != int(reference.argmax()))
    return compared, ties, unequal, worst


if __name__ == "__main__":
    main()
