"""Small models with each kind of pool, for tests of what an engine draws: with a cache in their format, and in fp8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.random_checkpoint import make_checkpoint

_MODELS = Path(__file__).parents[2] / "bench/models"


@dataclass(frozen=True, slots=True)
class Pooled:
    """A configuration of `bench/models`, and what its cache is in."""

    model: str
    options: Mapping[str, str]

    def checkpoint(self, folder: Path, seed: int) -> Path:
        """In float64, as the engine is to compute."""
        config = json.loads((_MODELS / f"{self.model}.json").read_text())
        return make_checkpoint(config, folder, seed=seed, dtype="float64")

    def on(self, device: str) -> Mapping[str, str]:
        """Options of an engine there, which computes in float64."""
        if self.options and device == "cuda":
            pytest.skip("on a GPU nothing reads a cache in 8 bits in float64")
        return {**self.options, "device": device}


POOLED = {
    "latents": Pooled("tiny", {}),
    "keys and values": Pooled("tiny-qwen3-moe", {}),
    "latents in fp8": Pooled("tiny", {"kv_cache_dtype": "fp8"}),
    "keys and values in fp8": Pooled("tiny-qwen3-moe", {"kv_cache_dtype": "fp8"}),
}
"""One pool of latents, and two of keys and values. A row in 8 bits is rounded when it is written and read as it is:
what is drawn from it is the same whoever wrote it."""
