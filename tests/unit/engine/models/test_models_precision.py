"""The format a model runs in when nobody said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from agentspeed_engine.models.precision import choose
from agentspeed_engine.serve.options import build, options_from
from agentspeed_kernels.cpu.native import AMX, AVX512BF16
from agentspeed_kernels.platform import Platform, detect
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
TILES = Platform(device="cpu", arch="x86_64", features=frozenset({AMX.feature}))
REFUSED = Platform(device="cpu", arch="x86_64", features=frozenset(), absent={AMX.feature: "the system said no"})
PAIRS = Platform(
    device="cpu",
    arch="x86_64",
    features=frozenset({AVX512BF16.feature}),
    lacks={AMX.feature: "the processor lacks AMX-BF16"},
)
REFUSED_PAIRS = replace(REFUSED, features=PAIRS.features)
OLDER = Platform(device="cpu", arch="x86_64", features=frozenset(), lacks={AMX.feature: "the processor lacks AMX-BF16"})
GPU = Platform(device="cuda", arch="sm_90", features=frozenset())


@pytest.mark.parametrize(("config", "platform", "dtype", "why"), [
    ({"dtype": "bfloat16"}, TILES, "bfloat16", "the checkpoint is bfloat16 and the processor has AMX tiles for it"),
    ({"torch_dtype": "float16"}, TILES, "bfloat16", "the checkpoint is float16 and the processor has AMX tiles for it"),
    ({"quantization_config": BLOCKS}, TILES, "bfloat16", "the checkpoint is fp8 and"),
    ({"dtype": "float32", "text_config": {"quantization_config": BLOCKS}}, TILES, "bfloat16", "the checkpoint is fp8"),
    ({"text_config": {"dtype": "bfloat16"}}, TILES, "bfloat16", "the checkpoint is bfloat16 and"),
    ({"quantization_config": {}}, TILES, "float32", "the checkpoint does not name its format, and"),
    ({"quantization_config": None, "dtype": "float32"}, TILES, "float32", "the checkpoint is float32, and"),
    ({"dtype": "float32"}, TILES, "float32", "the checkpoint is float32, and bfloat16 would round it"),
    ({}, TILES, "float32", "the checkpoint does not name its format, and"),
    ({"dtype": "bfloat16"}, REFUSED, "float32", "prompts are slower in bfloat16 here: the system said no"),
    ({"dtype": "bfloat16"}, PAIRS, "bfloat16", "the processor multiplies pairs of it (AVX512-BF16)"),
    ({"dtype": "float32"}, PAIRS, "float32", "the checkpoint is float32, and bfloat16 would round it"),
    ({"dtype": "bfloat16"}, REFUSED_PAIRS, "float32", "prompts are slower in bfloat16 here: the system said no"),
    ({"dtype": "bfloat16"}, OLDER, "float32", "prompts are slower in bfloat16 here: the processor lacks AMX-BF16"),
    ({"dtype": "bfloat16"}, GPU, "bfloat16", "cuda has matrix units for it"),
])  # fmt: skip
def test_bfloat16_is_taken_where_it_is_faster_and_rounds_nothing(
    config: dict[str, object], platform: Platform, dtype: str, why: str
) -> None:
    chosen, reason = choose(config, platform)
    assert chosen == dtype
    assert why in reason


def test_a_cache_in_fp8_is_read_in_bfloat16_on_a_gpu_and_in_any_format_on_a_cpu() -> None:
    assert choose({"dtype": "float32"}, GPU, "fp8")[0] == "bfloat16"
    assert choose({"dtype": "float32"}, TILES, "fp8")[0] == "float32"


def test_the_engine_says_which_format_it_took_and_why(tmp_path: Path) -> None:
    folder = make_checkpoint(CONFIG, tmp_path, dtype="bfloat16")
    said: list[str] = []
    build(options_from({"model": str(folder), "pages": 8}), said.append)
    dtype, why = choose(json.loads((folder / "config.json").read_text()), detect())
    assert said[0] == f"{dtype}: {why}"


def test_a_format_that_was_asked_for_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_checkpoint(CONFIG, tmp_path, dtype="bfloat16")
    said: list[str] = []
    build(options_from({"model": str(folder), "pages": 8, "dtype": "float32"}), said.append)
    assert said[0].startswith("loading ")
