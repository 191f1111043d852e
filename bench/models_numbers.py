"""What `bench/models.py` measures of the numbers: logits and draws of every family, and the time of a decoded token."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from agentspeed_engine.models import loaded
from agentspeed_engine.models.catalog import Dtype, load, read_source
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.models.kept_weights import kept_weights
from agentspeed_engine.protocol import messages as wire
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import Registry, standard
from tests.conformance.family_configs import random_config
from tests.support.engine_client import Front, engine
from tests.support.paged import Trail, batch
from tests.support.random_checkpoint import make_checkpoint
from tests.support.reference_models import reference_logits, reference_model

ROOT = Path(__file__).resolve().parent.parent
PROMPT, DECODED = 200, 8
"""Tokens of a comparison: enough that a prompt at once takes the path for many rows, and most rows of sparse attention
see more than they may read."""
PAGE = 8
HOT = wire.Sampling(temperature=1.3, top_k=200, top_p=0.98, min_p=0.001)
ENGINE = {
    "dtype": "float64", "page_tokens": 16, "threads": 1, "check_every_step": True, "firm_pages": 0, "prefill_chunk": 96,
}  # fmt: skip


# ---- logits ---------------------------------------------------------------------------------------------------------
@dataclass
class Choices:
    """Which experts, and which tokens, the rows of a step chose: what rounding may turn into another number."""

    made: list[torch.Tensor] = field(default_factory=list)

    def differ(self, other: Choices) -> torch.Tensor:
        """[rows]: whether any layer chose otherwise."""
        rows = torch.zeros(self.made[0].shape[0] if self.made else 0, dtype=torch.bool)
        for one, two in zip(self.made, other.made, strict=True):
            rows |= (one.sort(-1).values != two.sort(-1).values).any(-1)
        return rows


@contextmanager
def watched(choices: Choices) -> Iterator[None]:
    """Models that are loaded meanwhile note what they choose."""

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            found = call(*given)
            choices.made.append((found if isinstance(found, torch.Tensor) else found[0]).clone())
            return found

        return noted

    specs = [
        replace(spec, call=noting(spec.call)) if spec.op in ("route", "index_select") else spec for spec in standard()
    ]
    plain = loaded.standard
    loaded.standard = lambda: Registry(specs)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        loaded.standard = plain  # type: ignore[attr-defined]


def prompt_logits(folder: Path, ids: list[int], dtype: Dtype) -> tuple[torch.Tensor, Choices]:
    """All rows of one forward pass, and what they chose."""
    choices = Choices()
    with watched(choices):
        model = load(folder, dtype=dtype, pages=40, page_tokens=PAGE)
        return model.forward(batch(PAGE, [(Trail(PAGE, list(range(39, -1, -1))), ids)])).double(), choices


def stepwise_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """In float64, a prompt and then token by token."""
    model = load(folder, dtype="float64", pages=40, page_tokens=PAGE)
    trail = Trail(PAGE, list(range(39, -1, -1)))
    parts = [model.forward(batch(PAGE, [(trail, ids[:PROMPT])]))]
    return torch.cat([*parts, *(model.forward(batch(PAGE, [(trail, [token])])) for token in ids[PROMPT:])])


def logits(model_type: str, seeds: int) -> dict[str, Any]:
    """Worst errors over random configurations, relative to the largest logit. Rows of float32 from the first on at
    which rounding changed what is chosen are counted, not compared."""
    worst: dict[str, float] = {"float64": 0.0, "float32": 0.0}
    compared = tied = 0
    for seed in range(seeds):
        ids = torch.randint(0, 256, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(seed)).tolist()
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_checkpoint(random_config(model_type, seed), Path(scratch) / "64", seed=seed, dtype="float64")
            got = stepwise_logits(folder, ids)
            wanted = reference_logits(folder, ids)
            worst["float64"] = max(worst["float64"], float((got - wanted).abs().max() / wanted.abs().max()))
            folder = make_checkpoint(random_config(model_type, seed), Path(scratch) / "32", seed=seed, dtype="float32")
            narrow, chosen = prompt_logits(folder, ids, "float32")
            _, meant = prompt_logits(folder, ids, "float64")
            wanted = reference_logits(folder, ids)
            flips = chosen.differ(meant)
            end = int(flips.nonzero()[0]) if bool(flips.any()) else len(ids)
            error = (narrow - wanted).abs()[:end].amax() / wanted.abs().max() if end else torch.zeros(())
            worst["float32"] = max(worst["float32"], float(error))
            compared, tied = compared + end, tied + int(flips.any())
    rows = seeds * (PROMPT + DECODED)
    return {"configurations": seeds, **{name: float(f"{value:.2g}") for name, value in worst.items()},
            "float32_rows": compared, "of_rows": rows, "configurations_with_ties": tied}  # fmt: skip


# ---- draws ----------------------------------------------------------------------------------------------------------
def draws(model_type: str, seed: int = 0) -> dict[str, int]:
    """Turns that drew what a new session draws, and those that did not, by what was done to them. In float64."""
    counts: dict[str, int] = {}

    def count(what: str, same: bool) -> None:
        counts[what] = counts.get(what, 0) + same
        counts["different"] = counts.get("different", 0) + (not same)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = make_checkpoint(random_config(model_type, seed), folder / "model", seed=seed, dtype="float64")
        chance = random.Random(seed)
        with engine(folder, model=str(checkpoint), pages=600, context_limit=1024, **ENGINE) as process:
            front = process.connect()
            branched(front, chance, count)
            with tempfile.TemporaryDirectory() as other:
                crowd = {"pages": 22, "context_limit": 304}
                with engine(Path(other), model=str(checkpoint), **crowd, **ENGINE) as small:
                    crowded(small.connect(), front, chance, count)
            with tempfile.TemporaryDirectory() as other:
                tiers = {"pages": 40, "host_slots": 200, "host_saves": "always", "context_limit": 400}
                with engine(Path(other), model=str(checkpoint), **tiers, **ENGINE) as tiered:
                    moved(tiered.connect(), front, chance, count)
    return counts


def prompt(chance: random.Random, tokens: int) -> list[int]:
    return [chance.randrange(256) for _ in range(tokens)]


def fresh(front: Front, ids: list[int], tokens: int, seed: int) -> list[int]:
    """What a session that shares nothing draws after `ids`."""
    branch = front.open(private=True)
    turn = front.generate(branch, ids, max_tokens=tokens, sampling=HOT, seed=seed)
    front.end(branch)
    return turn.ids


def branched(front: Front, chance: random.Random, count: Callable[[str, bool], None]) -> None:
    ids = prompt(chance, 140)
    trunk = front.open(ids)
    for number in range(8):
        at = chance.randrange(1, len(ids))
        (child,) = front.fork(trunk, 1, at)
        new = prompt(chance, chance.randrange(1, 40))
        turn = front.generate(child, new, max_tokens=8, sampling=HOT, seed=number)
        count("forked", turn.ids == fresh(front, ids[:at] + new, 8, number))
        cut = chance.randrange(1, at)
        front.rewind(child, cut)
        turn = front.generate(child, new, max_tokens=8, sampling=HOT, seed=number)
        count("rewound", turn.ids == fresh(front, ids[:cut] + new, 8, number))
        front.end(child)
    front.end(trunk)


def crowded(small: Front, front: Front, chance: random.Random, count: Callable[[str, bool], None]) -> None:
    """Five turns in a pool for two: younger ones lose their room and get it back."""
    prompts = [prompt(chance, 100) for _ in range(5)]
    branches = [small.open() for _ in prompts]
    turns = [
        small.start(branch, ids, max_tokens=150, sampling=HOT, seed=number)
        for number, (branch, ids) in enumerate(zip(branches, prompts, strict=True))
    ]
    small.finish(*turns)
    if not small.counts()["preemptions"]:
        raise SystemExit("nothing was preempted, so nothing was measured")
    for number, (ids, turn) in enumerate(zip(prompts, turns, strict=True)):
        count("preempted", turn.ids == fresh(front, ids, 150, number))


def moved(tiered: Front, front: Front, chance: random.Random, count: Callable[[str, bool], None]) -> None:
    """Five sessions in a pool for three: what pauses goes to host memory and comes back."""
    logs = [prompt(chance, 200) for _ in range(5)]
    branches = [tiered.open() for _ in logs]
    resumed = 0
    for turn_number in range(3):
        for number, branch in enumerate(branches):
            new = logs[number] if not turn_number else [number, turn_number, 9]
            turn = tiered.generate(branch, new, max_tokens=6, sampling=HOT, seed=turn_number)
            assert turn.ended is not None
            before = logs[number] if not turn_number else logs[number] + new
            if turn.ended.usage.resumed_host:
                resumed += 1
                count("from_host", turn.ids == fresh(front, before, 6, turn_number))
            logs[number] = before + turn.ids
            tiered.ask(wire.Expect(request=tiered.number(), branch=branch, seconds=60.0), wire.LeaseAnswer)
    if not resumed:
        raise SystemExit("nothing came back from host memory, so nothing was measured")


# ---- decode ---------------------------------------------------------------------------------------------------------
CONFIG, CONTEXT, POOL_PAGE, CHUNK = ROOT / "bench/models/qwen3-50m.json", 4096, 64, 512


def decode(rounds: int, tokens: int, threads: int, stored: str) -> dict[str, Any]:
    """Tokens a second of one session at a context of 4096 in float32, ours and those of transformers with its cache,
    in turns; the ratio is the median over rounds. `stored`: format of the checkpoint, which decides what ours keeps
    matrices in. Logits of a step are compared, as in `logits`."""
    torch.set_num_threads(threads)
    folder = ROOT / ".checkpoints" / f"qwen3-50m-{stored}"
    if not (folder / "model.safetensors").exists():
        make_checkpoint(json.loads(CONFIG.read_text()), folder, dtype=stored)
    ids = np.random.default_rng(0).integers(0, 4096, CONTEXT)
    ours, theirs = Ours(folder, ids, threads), Theirs(folder, ids)
    got, wanted = ours.logits(7).double(), theirs.logits(7).double()
    pairs = [(ours.seconds(tokens), theirs.seconds(tokens)) for _ in range(rounds)]
    ratios = [their / our for our, their in pairs]
    return {
        "ratio": round(median(ratios), 2),
        "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
        "ours_ms": round(1000 * median(our for our, _ in pairs) / tokens, 2),
        "transformers_ms": round(1000 * median(their for _, their in pairs) / tokens, 2),
        "weights": ours.weights or "float32",
        "logits_apart": float(f"{float((got - wanted).abs().max() / wanted.abs().max()):.2g}"),
        "threads": threads,
    }


class Ours:
    """One session on the model alone, without an engine around it."""

    def __init__(self, folder: Path, ids: np.ndarray, threads: int) -> None:
        self.weights = kept_weights(read_source(folder), "float32", detect())
        self.model = load(
            folder,
            dtype="float32",
            pages=2 * CONTEXT // POOL_PAGE,
            page_tokens=POOL_PAGE,
            threads=threads,
            weights=self.weights,
        )
        self.known = 0
        for at in range(0, len(ids), CHUNK):
            self.feed(ids[at : at + CHUNK])

    def feed(self, ids: np.ndarray) -> torch.Tensor:
        at = np.arange(self.known, self.known + len(ids), dtype=np.int64)
        self.known += len(ids)
        pages = np.arange(-(-self.known // POOL_PAGE), dtype=np.int32)
        queries = np.arange(len(ids), dtype=np.int32)
        tail = Run(pages=pages, start=0, tokens=self.known, queries=queries, causal=True)
        select = np.array([len(ids) - 1])
        given = FlatBatch(ids=ids.astype(np.int64), positions=at, slots=at, runs=(tail,), select=select)
        return self.model.forward(given)

    def logits(self, token: int) -> torch.Tensor:
        """Of what follows the token."""
        return self.feed(np.array([token]))[0]

    def step(self, token: int) -> int:
        return int(self.logits(token).argmax())

    def seconds(self, tokens: int) -> float:
        return _timed(self.step, tokens)


class Theirs:
    """The same in transformers, with its default attention and its cache."""

    def __init__(self, folder: Path, ids: np.ndarray) -> None:
        self.model = reference_model(folder, torch.float32, attention="sdpa")
        self.cache: Any = None
        with torch.inference_mode():
            self.cache = self.model(torch.from_numpy(ids)[None], logits_to_keep=1).past_key_values

    def logits(self, token: int) -> torch.Tensor:
        """Of what follows the token."""
        with torch.inference_mode():
            said = self.model(torch.tensor([[token]]), past_key_values=self.cache)
        found: torch.Tensor = said.logits[0, -1]
        return found

    def step(self, token: int) -> int:
        return int(self.logits(token).argmax())

    def seconds(self, tokens: int) -> float:
        return _timed(self.step, tokens)


def _timed(step: Callable[[int], int], tokens: int) -> float:
    token, started = 7, time.perf_counter()
    for _ in range(tokens):
        token = step(token)
    return time.perf_counter() - started
