"""The list of models, from the registry: a page of the reference, and the table that stands in the README."""

from __future__ import annotations

import re

from agentspeed_engine.models.other_types import KNOWN
from agentspeed_engine.models.registry import FAMILIES

_TABLE = re.compile(r"(<!-- models -->\n).*?(<!-- /models -->)", re.DOTALL)

_PAGE = """# Models

What a model folder or a repository may hold, from `agentspeed_engine.models.registry`. Each family is compared with
transformers, logit by logit in float64, on random small configurations
(`tests/conformance/test_families_transformers.py`).

{table}
{notices}
Weights are safetensors in bfloat16, float16, float32 or float64, in fp8 e4m3 with one scale for each block of 128 ×
128, or in compressed-tensors' 4 bits (packed, symmetric, in groups, as Kimi-K2-Thinking has its experts). Whatever the
files hold, the options `dtype` and `weights` say what is kept in memory. Every other quantisation is refused by its
name, before any weight is read or fetched.

## From the hub

`Engine("owner/name", revision=...)` takes a branch, a tag or a commit. First come the configurations, and a model that
does not run is refused then; next the tokenizer, and the weights that the index names, all of one commit. Cache, token,
endpoint and offline mode are those of huggingface_hub.

## In memory

By default a pool takes a quarter of the memory that the process may use: the machine's, or what its container may have.
Weights that do not fit are refused before they are read, with the `dtype` that would. A load takes room for a
few matrices beside what stays, and nothing of the files stays mapped: its peak is at most 1.15 of what stays
([measured](../performance.md#loading-a-model)). Files are read by eight threads at once. How far it is stands in the
log `agentspeed.engine` at each tenth; `Engine(..., on_start=told)` and `Session(..., on_start=told)` are told at each
hundredth, and `agentspeed chat`, `serve` and `engine` show it. Sessions share an engine as
long as the model's files stay as they are; weights written anew get an engine of their own.

## What is refused

| `model_type` | what is missing | nearest that runs |
|---|---|---|
{refused}
Types that are in neither list are told by the fields of their configuration.
"""


def table() -> str:
    """One row a family."""
    lines = ["| family | `model_type` | attention |", "|---|---|---|"]
    for family in FAMILIES:
        types = ", ".join(f"`{name}`" for name in family.model_types)
        lines.append(f"| {family.name} | {types} | {family.attention} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """What runs, how weights may be stored, and what is refused."""
    notices = "".join(f"- {family.name}: {family.notice}\n" for family in FAMILIES if family.notice)
    refused = "".join(
        f"| `{name}` | {what} | {f'`{nearest}`' if nearest else ''} |\n" for name, (what, nearest) in KNOWN.items()
    )
    return _PAGE.format(table=table(), notices=notices, refused=refused)


def with_table(readme: str) -> str:
    """A README with the table as it is now between its two marks."""
    changed, count = _TABLE.subn(lambda found: f"{found[1]}{table()}{found[2]}", readme)
    if count != 1:
        raise ValueError("the README has no place for the table of models")
    return changed
