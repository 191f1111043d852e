"""Writes a random checkpoint of any family that runs, in its published layout: tests and benchmarks need no download.

    python tests/support/random_checkpoint.py bench/models/tiny.json .checkpoints/tiny --seed 0 --dtype float32

The same configuration, seed and dtype always give the same bytes. The folder loads in transformers as well.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from agentspeed_engine.models.config import parse_as
from agentspeed_engine.models.registry import family_of
from agentspeed_engine.models.tensor_shapes import Shape
from agentspeed_engine.models.weights import random_tensor

SPECIALS = (
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<tool_call>",
    "</tool_call>",
)
"""Ids 256, 257, ...: bos is 256 and eos is 257 in every configuration of `bench/models`."""

CHAT_TEMPLATE = """{{- '<|begin|>' -}}
{%- if tools -%}<|system|>Tools: {{ tools | tojson }}<|end|>{%- endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>
{%- endfor -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def make_checkpoint(config: dict[str, Any], out: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """A folder with config.json, model.safetensors, tokenizer.json and tokenizer_config.json. Returns `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
    save_file(random_weights(config, seed, DTYPES[dtype]), str(out / "model.safetensors"), metadata={"format": "pt"})
    described = config.get("text_config", config)
    byte_tokenizer(described["vocab_size"]).save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIALS[0],
                "eos_token": SPECIALS[1],
                "model_max_length": described["max_position_embeddings"],
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
        + "\n"
    )
    return out


def weight_shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Every tensor of the checkpoint as it is named there, with its shape, in file order."""
    family = family_of(config)
    parsed, _ = parse_as(family, config, None)
    for name, shape in family.shapes(parsed):
        yield family.prefix + name, shape


def random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Drawn one after the other in file order; the router's correction stays float32, as it is published."""
    noise = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in weight_shapes(config):
        drawn = random_tensor(name, shape, noise)
        weights[name] = drawn if name.endswith("e_score_correction_bias") else drawn.to(dtype)
    return weights


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE: 256 bytes, the special tokens, then merges of lower-case letters until `vocab_size` ids exist."""
    if vocab_size < 256 + len(SPECIALS):
        raise ValueError(f"vocab_size {vocab_size} has no room for 256 bytes and {len(SPECIALS)} special tokens")
    alphabet = [token for _, token in sorted((byte, token) for token, byte in _byte_alphabet().items())]
    vocab = {token: index for index, token in enumerate(alphabet)}
    vocab |= {token: 256 + index for index, token in enumerate(SPECIALS)}
    merges: list[tuple[str, str]] = []
    for left, right in _merges():
        if len(vocab) == vocab_size:
            break
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte that byte-level tokenizers share."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_in = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return stand_in | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def _merges() -> Iterator[tuple[str, str]]:
    yield from (("Ġ", letter) for letter in ascii_lowercase)
    yield from product(ascii_lowercase, ascii_lowercase)
    yield from ((left + right, letter) for left, right, letter in product(ascii_lowercase, repeat=3))
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    yield from product(pairs, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config.json of a model_type that runs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    make_checkpoint(config, arguments.out, arguments.seed, arguments.dtype)
    count = sum(math.prod(shape) for _, shape in weight_shapes(config))
    print(f"{arguments.out}: {count / 1e6:.1f} M parameters, {arguments.dtype}, seed {arguments.seed}")


if __name__ == "__main__":
    main()
