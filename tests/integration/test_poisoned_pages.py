"""A turn whose model computes no finite numbers ends with the reason, and no other turn hears of it: neither one that
gets its pages next, of whatever tenant, nor one that begins with the same ids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from agentspeed_engine.protocol import messages as wire
from tests.conformance.family_configs import random_config
from tests.devices import DEVICES
from tests.support.engine_client import Front, TurnRecord, engine
from tests.support.random_checkpoint import make_checkpoint

PAGE, PAGES = 16, 20
POISON, PROMPT = 7, [10 + i for i in range(37)]
TOLD = wire.Sampling(logprobs=1)
LATENT: dict[str, Any] = json.loads((Path(__file__).parents[2] / "bench/models/tiny.json").read_text())
GROUPED = random_config("qwen3", 0) | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module", params=[LATENT, GROUPED], ids=["latent", "grouped"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for which one id has an embedding that is not finite."""
    made = make_checkpoint(request.param | {"tie_word_embeddings": False}, tmp_path_factory.mktemp("poisoned"), seed=3)
    weights = load_file(made / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = math.inf
    save_file(weights, made / "model.safetensors")
    return made


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def front(
    request: pytest.FixtureRequest, folder: Path, device: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    with engine(
        tmp_path_factory.mktemp("engine"), model=str(folder), dtype=request.param, device=device, pages=PAGES,
        page_tokens=PAGE, context_limit=PAGE * 8, prefill_chunk=32, threads=1, check_every_step=True,
    ) as process:  # fmt: skip
        yield process.connect()


def victim(front: Front, **where: Any) -> TurnRecord:
    """A turn, and one of a fork that goes on in a copied page."""
    branch = front.open(**where)
    first = front.generate(branch, PROMPT, max_tokens=6, sampling=TOLD)
    (child,) = front.fork(branch)
    second = front.generate(child, [3], max_tokens=3, sampling=TOLD)
    for one in (child, branch):
        front.end(one)
    assert first.ended is not None and second.ended is not None
    assert (first.ended.reason, second.ended.reason) == ("max_tokens", "max_tokens")
    return TurnRecord(ids=first.ids + second.ids, logprobs=first.logprobs + second.logprobs)


def poisoned(front: Front, ids: list[int]) -> None:
    branch = front.open()
    turn = front.generate(branch, ids, max_tokens=2)
    assert turn.ids == [] and turn.ended is not None
    assert turn.ended.reason == "error" and "no finite numbers" in turn.ended.message
    front.end(branch)


def test_whoever_gets_the_pages_next_draws_what_it_would_have_drawn(front: Front) -> None:
    wanted = victim(front, tenant="before", private=True)
    for _ in range(3):
        poisoned(front, [POISON] * (PAGE * 7 + 9))
    for tenant in ("another", "and-another"):
        again = victim(front, tenant=tenant, private=True)
        assert again.ids == wanted.ids
        assert again.logprobs == pytest.approx(wanted.logprobs, abs=1e-6)


def test_a_prompt_that_was_cancelled_before_anybody_saw_its_logits_spoils_nothing_either(front: Front) -> None:
    wanted = victim(front, tenant="before", private=True)
    for _ in range(4):
        branch = front.open(private=True)
        turn = front.start(branch, [POISON] * (PAGE * 7 + 9), max_tokens=2)
        front.cancel(branch)
        front.finish(turn)
        front.end(branch)
    again = victim(front, tenant="another", private=True)
    assert again.ids == wanted.ids


def test_a_prompt_of_the_same_ids_finds_no_row_of_a_poisoned_turn(front: Front) -> None:
    prompt = [100 + i for i in range(3 * PAGE)]
    poisoned(front, [*prompt, POISON, 5])
    turn = front.generate(front.open(), prompt, max_tokens=1)
    assert turn.started is not None and turn.started.usage.shared == 0
    assert turn.ended is not None and turn.ended.reason == "max_tokens"
