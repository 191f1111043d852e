"""What importing the SDK costs and brings, seen from a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = {"torch", "numpy", "transformers", "tokenizers", "llguidance", "safetensors", "huggingface_hub", "jinja2"}


def modules_after(statement: str) -> tuple[set[str], float]:
    """Top-level modules loaded by a statement, and the least of three times it took."""
    code = (
        "import json, sys, time; before = set(sys.modules); started = time.perf_counter()\n"
        f"{statement}\n"
        "seconds = time.perf_counter() - started\n"
        "print(json.dumps([sorted({name.partition('.')[0] for name in set(sys.modules) - before}), seconds]))"
    )
    paths = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'engine'), str(ROOT / 'kernels')]!r}\n"
    runs = [
        json.loads(
            subprocess.run([sys.executable, "-c", paths + code], check=True, capture_output=True, text=True).stdout
        )
        for _ in range(3)
    ]
    return set(runs[0][0]), min(seconds for _, seconds in runs)


def test_importing_agentspeed_is_fast_and_loads_nothing_heavy() -> None:
    loaded, seconds = modules_after("import agentspeed")
    assert not loaded & (HEAVY | {"pydantic", "anyio", "agentspeed_engine"})
    assert seconds < 0.3


def test_the_session_class_needs_no_part_of_the_engine_but_its_words() -> None:
    loaded, _ = modules_after("from agentspeed import Session, Engine, tool, events, errors")
    assert not loaded & (HEAVY | {"httpx"}), "httpx brings ssl, and where they are there click and rich"
    engine, _ = modules_after(
        "import agentspeed.session, sys; sys.modules.update()\n"
        "assert not any(name.startswith('agentspeed_engine.') and "
        "name.split('.')[1] != 'protocol' for name in sys.modules)"
    )
    assert "agentspeed_engine" in engine


def test_every_public_name_can_be_had_and_is_listed() -> None:
    code = (
        "import agentspeed; assert set(agentspeed.__all__) <= set(dir(agentspeed)); "
        "assert {*agentspeed._HOMES, *agentspeed._MODULES} < set(agentspeed.__all__); "
        "[getattr(agentspeed, name) for name in agentspeed.__all__]"
    )
    loaded, _ = modules_after(code)
    assert "torch" not in loaded
