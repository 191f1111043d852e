"""Whether every family of models computes, writes and reads what its publishers' code does, and how fast it decodes.

    python bench/models.py
    python bench/models.py --part logits --family deepseek_v32 --seeds 3

Parts: logits (against transformers, float64 and float32, random configurations of every `model_type`), draws (forks,
rewinds, preemptions and the host tier against new sessions, float64), codec (random conversations of every chat format
against its template), calls (written or drawn under the grammar, and read back), tokenizers (against their own
libraries, on hostile text), decode (the qwen3 shape of 50 M parameters in float32 against transformers with its cache,
from a checkpoint in bfloat16, as such models are published, and from one in float32). Times are ratios taken in turns.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "bench")]

import models_numbers as numbers
import models_text as text

from tests.conformance.family_configs import ARCHITECTURE
from tests.support.chat_templates import FAMILIES

PARTS = ("logits", "draws", "codec", "calls", "tokenizers", "decode")
STORED = ("bfloat16", "float32")
"""Formats of the checkpoint that is decoded from: as models are published, which is what must be reached, and wider."""
MUST_FLOAT64, MUST_FLOAT32, MUST_RATIO = 1e-12, 2e-5, 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="nothing: all of them; may be given again")
    parser.add_argument("--family", action="append", help="a model_type or a chat format, such as 'qwen 3'")
    parser.add_argument("--seeds", type=int, default=12, help="configurations of each family")
    parser.add_argument("--conversations", type=int, default=510, help="of each chat format")
    parser.add_argument("--calls", type=int, default=100, help="written ones of each chat format")
    parser.add_argument("--texts", type=int, default=2000, help="hostile ones for each kind of tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20, help="decoded in a round")
    options = parser.parse_args()
    types = [name for name in ARCHITECTURE if not options.family or name in options.family]
    formats = [name for name in FAMILIES if not options.family or name in options.family]
    figures: dict[str, Any] = {}
    met: dict[str, bool] = {}
    for part in options.part or PARTS:
        found, reached = run(part, types, formats, options)
        figures[part], met[part] = found, reached
        print(f"{part:10} {'reached' if reached else 'MISSED'}", flush=True)
    print(json.dumps({"bench": "models", "met": all(met.values()), "parts": met, **figures}, ensure_ascii=False))


def run(part: str, types: list[str], formats: list[str], options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """(The figures of one part, whether they are what they must be)."""
    found: dict[str, Any] = {}
    if part == "decode":
        for stored in STORED:
            one = found[f"stored in {stored}"] = numbers.decode(options.rounds, options.tokens, options.threads, stored)
            reached = one["ratio"] >= MUST_RATIO
            print(f"  {stored:16} {one}  must {MUST_RATIO}: {'reached' if reached else 'MISSED'}", flush=True)
        published = found[f"stored in {STORED[0]}"]
        return found, published["ratio"] >= MUST_RATIO and published["logits_apart"] <= MUST_FLOAT32
    if part == "tokenizers":
        found = text.tokenizers(options.texts)
        return found, all(one["equal"] == one["texts"] for one in found.values())
    if part in ("logits", "draws"):
        for name in types:
            found[name] = numbers.logits(name, options.seeds) if part == "logits" else numbers.draws(name)
            print(f"  {name:16} {found[name]}", flush=True)
        return found, all(_numbers_reached(part, one) for one in found.values())
    with tempfile.TemporaryDirectory() as scratch:
        folders = text.folders(Path(scratch))
        for name in formats:
            if part == "calls" and not FAMILIES[name].tools:
                continue
            one = (
                text.codec(name, folders[name], options.conversations)
                if part == "codec"
                else text.calls(name, folders[name], options.calls)
            )
            found[name] = one
            print(f"  {name:16} {one}", flush=True)
    if part == "codec":
        return found, all(one["equal"] == one["conversations"] for one in found.values())
    return found, all(one["read_back"] == one["calls"] and one["published"] is not False for one in found.values())


def _numbers_reached(part: str, one: dict[str, Any]) -> bool:
    if part == "draws":
        return not one["different"]
    return bool(one["float64"] <= MUST_FLOAT64 and one["float32"] <= MUST_FLOAT32)


if __name__ == "__main__":
    main()
