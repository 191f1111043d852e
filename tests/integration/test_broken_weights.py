"""A model whose weights are no numbers: its turns end with the reason, one by one, and the engine serves on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from llguidance import LLMatcher
from safetensors.torch import load_file, save_file

from agentspeed_engine.protocol import messages as wire
from tests.support.engine_client import Front, engine
from tests.support.random_checkpoint import make_checkpoint

CONFIG = Path(__file__).parents[2] / "bench/models/tiny.json"
DIGITS = wire.Grammar(source=LLMatcher.grammar_from_regex("[0-9]{4}"))
SAMPLINGS = {
    "greedy": wire.Sampling(),
    "with logprobs": wire.Sampling(logprobs=2),
    "hot": wire.Sampling(temperature=1.0),
    "nearly greedy": wire.Sampling(temperature=1e-320),
    "cut": wire.Sampling(temperature=1.0, top_k=3, top_p=0.5),
}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = make_checkpoint(json.loads(CONFIG.read_text()), tmp_path_factory.mktemp("broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, folder / "model.safetensors")
    with engine(
        tmp_path_factory.mktemp("engine"), model=str(folder), pages=40, page_tokens=16, threads=1, check_every_step=True
    ) as process:
        yield process.connect()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("grammar", [None, DIGITS], ids=["free", "grammar"])
def test_a_turn_of_broken_weights_ends_with_the_reason(
    front: Front, sampling: wire.Sampling, grammar: wire.Grammar | None
) -> None:
    turn = front.generate(front.open([1, 2, 3]), max_tokens=3, sampling=sampling, grammar=grammar, stop_ids=(257,))
    assert turn.ids == []
    assert turn.ended is not None and turn.ended.reason == "error"
    assert "logits that are no finite numbers" in turn.ended.message
    assert "weights" in turn.ended.message
    assert front.counts()["branches"] >= 1
