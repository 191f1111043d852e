"""The kernels of pools in 8 bits in the shapes that decide speed, V2-Lite's and Qwen3-8B's, for `builds`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from agentspeed_kernels.fp8_cache import heads_row, latent_row
from agentspeed_kernels.triton import attention
from agentspeed_kernels.triton.device_code import device_module
from agentspeed_kernels.triton.fp8_cache_kernels import DECODED_TOKENS, SCALES

Shape: TypeAlias = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], bool]
"""Name, function, signature, constants, options, whether it is Gluon."""
BF16, FP32, INT32, INT64, BYTES = "*bf16", "*fp32", "*i32", "*i64", "*u8"
LATENT, KEYS = latent_row(512, 64), heads_row(8, 128)
_PLAN: dict[str, str] = dict.fromkeys(("rows", "visible", "pages", "items", "bounds"), INT32)
_LEFT: dict[str, str] = {"q": BF16, "part": FP32, "part_weight": FP32, "out": BF16, "scale2": "fp32"}


def fp8_cache_builds(target: str) -> Iterator[Shape]:
    yield from _rows(target)
    yield from _groups(target)
    if target == "cuda:90":
        yield from _hopper()
    yield from _moves(early=target.startswith("cuda"))


def _rows(target: str) -> Iterator[Shape]:
    forms = [("16", attention.BYTES_16, False), ("16-edge", attention.BYTES_16, True)]
    forms.append(("32", attention.BYTES_32, True))
    if target.startswith("hip"):
        forms = [("16", attention.BYTES_HIP, False), ("16-edge", attention.BYTES_HIP, True)]
    for name, form, edge in forms:
        tiles = {"latents": ("i16", 256), "scales": ("fp32", SCALES), "turned": ("bf16", 64)}
        yield (
            f"rows-fp8-cache-{name}",
            device_module("rows_fp8").attend_rows,
            _PLAN | _LEFT | {key: _tile(form.tile, *one) for key, one in tiles.items()},
            {
                "R": form.block_rows, "T": form.tile, "PAGE": 64, "RANK": 512, "ROPE": 64, "WIDE": 256, "WIDE_ROPE": 64,
                "SCALES_AT": LATENT.scales_at // 4, "TURNED_AT": LATENT.plain_at // 2, **_choices(form, edge, target),
            },
            {"num_warps": form.warps, "num_stages": form.stages},
            False,
        )  # fmt: skip


def _hopper() -> Iterator[Shape]:
    from triton.experimental.gluon import language as gl

    layout = repr(gl.NVMMASharedLayout(128, 16))
    form = attention.BYTES_HOPPER
    yield (
        "rows-fp8-cache-hopper",
        device_module("rows_fp8_hopper").attend_rows,
        _PLAN | _LEFT | {
            "scales": FP32, "latents": f"tensordesc<i16[64, 64],{layout}>",
            "turned": f"tensordesc<bf16[64, 64],{layout}>",
        },
        {"R": form.block_rows, "PAGE": 64, "RING": form.stages, "EDGE": True},
        {"num_warps": form.warps},
        True,
    )  # fmt: skip


def _groups(target: str) -> Iterator[Shape]:
    forms = [("16", attention.BYTES_GROUP_16, False), ("16-edge", attention.BYTES_GROUP_16, True)]
    forms.append(("32", attention.BYTES_GROUP_32, True))
    if target.startswith("hip"):
        forms = [("16", attention.BYTES_GROUP_HIP, False), ("16-edge", attention.BYTES_GROUP_HIP, True)]
    for name, form, edge in forms:
        tiles = {"": ("i16", 64), "_scales": ("fp32", SCALES)}
        yield (
            f"groups-fp8-cache-{name}",
            device_module("grouped_fp8").attend_groups,
            _PLAN | _LEFT
            | {f"key{key or 's'}": _tile(form.tile, *one) for key, one in tiles.items()}
            | {f"value{key or 's'}": _tile(form.tile, *one) for key, one in tiles.items()}
            | dict.fromkeys(("q_token", "q_head", "heads", "slots"), "i32"),
            {
                "R": form.block_rows, "T": form.tile, "PAGE": 64, "W": 128, "WIDE": 64,
                "SCALES_AT": KEYS.scales_at // 4, **_choices(form, edge, target),
            },
            {"num_warps": form.warps, "num_stages": form.stages},
            False,
        )  # fmt: skip


def _moves(early: bool) -> Iterator[Shape]:
    elementwise, queries, grouped = (device_module(name) for name in ("elementwise", "queries", "grouped"))
    given = {"gain": BF16, "cos": BF16, "sin": BF16, "slots": INT64, "eps": "fp32"}
    latent = given | {"raw": BF16, "pool": BYTES}
    yield (
        "latent_append-fp8-cache",
        elementwise.latent_append,
        latent | {"raw_stride": "i32"},
        {"RANK": 512, "HALF": 32, "BLOCK": 512, "BLOCK_HALF": 32},
        {"num_warps": 1},
        False,
    )
    yield (
        "queries_few-fp8-cache",
        queries.queries_few,
        latent | dict.fromkeys(("q", "key_up", "out"), BF16) | dict.fromkeys(("q_token", "q_head", "raw_token"), "i32"),
        {
            "HEADS": 16, "H2": 16, "RANK": 512, "NOPE": 128, "HALF": 32, "BN": 64, "BLOCKS": 8, "BK": 128, "BLOCK": 512,
            "BLOCK_HALF": 32, "EARLY": early,
        },
        {"num_warps": 4},
        False,
    )  # fmt: skip
    yield (
        "qkv_append-fp8-cache",
        grouped.qkv_append,
        given | dict.fromkeys(("qkv", "q_gain", "k_gain", "q"), BF16) | dict.fromkeys(("keys", "values"), BYTES)
        | dict.fromkeys(("qkv_token", "qkv_head"), "i32"),
        {
            "HEADS": 32, "GROUPS": 8, "HALF": 64, "BLOCK": 64, "BH": 16, "Q_NORM": True, "K_NORM": True,
            "ROW": KEYS.nbytes, "SCALES_AT": KEYS.scales_at, "EARLY": early,
        },
        {"num_warps": 4},
        False,
    )  # fmt: skip
    yield (
        "decode_pages",
        elementwise.decode_pages,
        {"pool": BYTES, "pages": INT32, "out": BF16, "page_stride": "i32"},
        {
            "HEADS": 1, "WIDTH": 512, "PLAIN": 64, "BYTES": LATENT.nbytes, "SCALES_AT": LATENT.scales_at,
            "PLAIN_AT": LATENT.plain_at, "PAGE": 64, "TOKENS": DECODED_TOKENS, "BLOCK": 512, "BLOCK_PLAIN": 64,
        },
        {"num_warps": 4},
        False,
    )  # fmt: skip


def _choices(form: attention.Form, edge: bool, target: str) -> dict[str, Any]:
    nvidia = target.startswith("cuda")
    return {"ONE": False, "RUN": False, "EDGE": edge, "STAGES": form.stages, "ASM": nvidia, "EARLY": nvidia}


def _tile(tokens: int, kind: str, columns: int) -> str:
    return f"tensordesc<{kind}[{tokens},{columns}]>"
