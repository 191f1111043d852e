"""The published code of a model folder, in transformers: what every family is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.conformance.family_configs import ARCHITECTURE

_MODULES = (
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "llama", "qwen2", "qwen3", "qwen3_moe", "kimi_k25",
    "deepseek_v32", "glm_moe_dsa",
)  # fmt: skip
_KNOWN_AS = {"kimi_k2": "deepseek_v3", "youtu_llm": "youtu"}
"""Published with code of its own, which transformers reads as another type."""


@contextmanager
def all_in_float64() -> Iterator[None]:
    """The reference takes norms, scores and softmax in float32 by name; here that name means float64."""
    modules: list[Any] = [import_module(f"transformers.models.{name}.modeling_{name}") for name in _MODULES]
    proxy = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if not name.startswith("__")})
    proxy.float32 = proxy.float = torch.float64
    for module in modules:
        module.torch = proxy
    plain = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = plain  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch


def reference_model(folder: Path, dtype: torch.dtype, attention: str = "eager") -> Any:
    """The model of a folder as its publishers run it, with plain experts."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = json.loads((folder / "config.json").read_text())
    name = _KNOWN_AS.get(config["model_type"])
    if name is not None:
        (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))
    kind = getattr(transformers, ARCHITECTURE[config["model_type"]])
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention, experts_implementation="eager")


def reference_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """What transformers computes of a model folder in float64, [T, vocab]."""
    model = reference_model(folder, torch.float64)
    with torch.inference_mode(), all_in_float64():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits
