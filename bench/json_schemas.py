"""How many schemas of a benchmark's folder are taken, and how exactly, by the benchmark's own instances.

    python bench/json_schemas.py FOLDER

FOLDER is `maskbench/data` of a checkout of jsonschemabench: files of {"schema": ..., "tests": [{"data", "valid"}]}. A
sample (`--each` files of a group, drawn with `--seed`; 0 is all) is compiled with the default bounds. Printed are
counts: of "fully right" schemas every valid instance can be written and no invalid one can.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.grammars import check_expressible, schema_source

BYTES = LLTokenizer("byte")


@dataclass(frozen=True)
class Verdict:
    """What became of one schema: refused, or accepted with so many instances on the wrong side."""

    name: str
    group: str
    refusal: str = ""
    valid_refused: int = 0
    invalid_accepted: int = 0
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        if self.refusal:
            return "refused"
        if self.invalid_accepted:
            return "accepted though invalid"
        return "some valid refused" if self.valid_refused else "fully right"


def group_of(file: Path) -> str:
    return file.stem.split("---")[0] if "---" in file.stem else re.sub(r"_\d+$", "", file.stem)


def sampled(folder: Path, each: int, seed: int) -> list[Path]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        groups[group_of(file)].append(file)
    draw = random.Random(seed)
    return [
        file
        for _, files in sorted(groups.items())
        for file in (draw.sample(files, min(each, len(files))) if each else files)
    ]


def judge(file: Path) -> Verdict:
    given: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    started = time.perf_counter()
    try:
        source = schema_source(check_expressible(given["schema"]))
    except SchemaUnsupported as error:
        return Verdict(file.name, group_of(file), str(error), seconds=time.perf_counter() - started)
    took = time.perf_counter() - started
    start, wrong = LLMatcher(BYTES, source, log_level=0), Counter[bool]()
    for test in given.get("tests", ()):
        text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")
        reader = start.deep_copy()
        written = reader.try_consume_tokens(list(text)) == len(text) and reader.is_accepting()
        wrong[test["valid"]] += written != test["valid"]
    return Verdict(file.name, group_of(file), "", wrong[True], wrong[False], took)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _ = parser.add_argument("folder", type=Path)
    _ = parser.add_argument("--each", type=int, default=80, help="files of each group; 0: all of them")
    _ = parser.add_argument("--seed", type=int, default=7)
    _ = parser.add_argument("--processes", type=int, default=2)
    _ = parser.add_argument("--show", default="", help="also print the files of one kind, e.g. 'refused'")
    options = parser.parse_args(arguments)
    files = sampled(options.folder, options.each, options.seed)
    if not files:
        raise SystemExit(f"{options.folder} has no *.json; give maskbench/data of a checkout of jsonschemabench.")
    with ProcessPoolExecutor(options.processes) as pool:
        verdicts = list(pool.map(judge, files, chunksize=8))
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        groups[verdict.group][verdict.kind] += 1
        if verdict.kind == options.show:
            print(f"{verdict.name}: {verdict.refusal or (verdict.valid_refused, verdict.invalid_accepted)}")
    kinds = ("fully right", "some valid refused", "accepted though invalid", "refused")
    print(f"{'group':<24}" + "".join(f"{kind:>26}" for kind in kinds))
    for group, found in sorted(groups.items()):
        print(f"{group:<24}" + "".join(f"{found[kind]:>26}" for kind in kinds))
    total = Counter(verdict.kind for verdict in verdicts)
    print(f"{len(verdicts):<24}" + "".join(f"{total[kind]:>26}" for kind in kinds))
    slow = sorted(verdict.seconds for verdict in verdicts)
    print(f"to compile: median {slow[len(slow) // 2]:.3f} s, the slowest {slow[-1]:.1f} s")


if __name__ == "__main__":
    main()
