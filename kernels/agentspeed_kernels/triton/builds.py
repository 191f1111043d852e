"""The Triton kernels in the shapes that decide speed: what `compiled` compiles for each chip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from agentspeed_kernels.triton.device_code import device_module
from agentspeed_kernels.triton.fp8_cache_builds import fp8_cache_builds
from agentspeed_kernels.triton.invariant import WIDE, linear_shape
from agentspeed_kernels.triton.kernels import grouped_shape

BF16, FP32, INT32, INT64, FP64, FP8 = "*bf16", "*fp32", "*i32", "*i64", "*fp64", "*fp8e4nv"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One kernel in one shape: V2-Lite's, at the sizes that decide speed."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    gluon: bool = False


def builds(target: str) -> Iterator[Build]:
    """All kernels that would run on `cuda:90`, `cuda:100` or `hip:gfx950`."""
    yield from _rows(target)
    yield from _layers(early=target.startswith("cuda"))
    yield from _fp8(early=target.startswith("cuda"))
    yield from _extend(target)
    yield from _grouped(target)
    for name, function, signature, constants, options, gluon in fp8_cache_builds(target):
        yield Build(
            name=name, function=function, signature=signature, constants=constants, options=options, gluon=gluon
        )
    if target == "cuda:90":
        yield from _gluon()
    if target.startswith("cuda"):
        yield from _peers()


def _rows(target: str) -> Iterator[Build]:
    from agentspeed_kernels.triton import attention

    rows = device_module("rows")

    shapes = [("16", attention.ROWS_16, False), ("16-edge", attention.ROWS_16, True), ("32", attention.ROWS_32, True)]
    if target == "cuda:90":
        shapes.append(("64", attention.ROWS_64, True))
    if target.startswith("hip"):
        shapes = [("16", attention.ROWS_16_HIP, False), ("16-edge", attention.ROWS_16_HIP, True)]
    for name, form, edge in shapes:
        yield Build(
            name=f"rows-{name}",
            function=rows.attend_rows,
            signature=_rows_signature() | {
                "latents": f"tensordesc<bf16[{form.tile},512]>", "turned": f"tensordesc<bf16[{form.tile},64]>",
            },
            constants={
                "R": form.block_rows, "T": form.tile, "PAGE": 64, "RANK": 512, "ROPE": 64, "WIDE": 512, "SPLIT": True,
                "ONE": False, "RUN": False, "EDGE": edge, "STAGES": form.stages, "EARLY": target.startswith("cuda"),
            },
            options={"num_warps": form.warps, "num_stages": form.stages},
        )  # fmt: skip
    yield Build(
        name="merge",
        function=rows.merge,
        signature={
            "part": FP32, "part_weight": FP32, "out": BF16, "unit_row": INT32, "table": INT32, "PARTS": "i32",
            "heads": "i32", "slots": "i32",
        },
        constants={
            "UNIT": 16, "RANK": 512, "COLUMNS": 64, "TAKE": 32, "SHOT": False, "GROUPS": 1,
            "EARLY": target.startswith("cuda"),
        },
        options={"num_warps": 1},
    )  # fmt: skip


def _peers() -> Iterator[Build]:
    peers = device_module("peers")

    yield Build(
        name="add_up",
        function=peers.add_up,
        signature={"x": INT32, "out": INT32, "table": INT64, "over": INT32, "counts": INT32, "N": "i32"},
        constants={"RANK": 0, "RANKS": 2, "FIRST": 64, "WORDS": 512, "HALVES": True, "EARLY": True},
        options={"num_warps": 8},
    )
    yield Build(
        name="spread",
        function=peers.spread,
        signature={"x": INT32, "table": INT64, "WIDTH": "i32", "FIRST": "i32"},
        constants={"RANK": 0, "RANKS": 2, "BLOCK": 1024},
        options={"num_warps": 4},
    )
    yield Build(
        name="meet",
        function=peers.meet,
        signature={"table": INT64, "over": INT32, "count": INT32},
        constants={"RANK": 0, "RANKS": 2},
        options={"num_warps": 1},
    )


def _gluon() -> Iterator[Build]:
    from triton.experimental.gluon import language as gl

    from agentspeed_kernels.triton import attention

    rows_hopper = device_module("rows_hopper")

    layout = repr(gl.NVMMASharedLayout(128, 16))
    for name, form in (("large", attention.HOPPER_LARGE), ("small", attention.HOPPER_SMALL)):
        yield Build(
            name=f"rows-hopper-{name}",
            function=rows_hopper.attend_rows_hopper,
            signature=_rows_signature() | {
                "latents": f"tensordesc<bf16[{form.tile}, 256],{layout}>",
                "turned": f"tensordesc<bf16[{form.tile}, 64],{layout}>",
            },
            constants={"PAGE": 64, "T": form.tile, "RING": form.stages, "EDGE": True},
            options={"num_warps": form.warps, "maxnreg": 168},
            gluon=True,
        )  # fmt: skip


def _rows_signature() -> dict[str, str]:
    return {
        "q": BF16, "rows": INT32, "visible": INT32, "pages": INT32, "items": INT32, "bounds": INT32, "part": FP32,
        "part_weight": FP32, "out": BF16, "scale2": "fp32",
    }  # fmt: skip


def _layers(early: bool) -> Iterator[Build]:
    from agentspeed_kernels.triton import sampling

    elementwise = device_module("elementwise")
    experts = device_module("experts")
    products = device_module("products")
    queries = device_module("queries")
    sample = device_module("sample")

    yield Build(
        name="latent_append",
        function=elementwise.latent_append,
        signature={
            "raw": BF16, "gain": BF16, "cos": BF16, "sin": BF16, "slots": INT64, "pool": BF16, "raw_stride": "i32",
            "eps": "fp32",
        },
        constants={"RANK": 512, "HALF": 32, "BLOCK": 512, "BLOCK_HALF": 32},
        options={"num_warps": 1},
    )  # fmt: skip
    yield Build(
        name="add_norm_linear",
        function=products.linear,
        signature={
            "x": BF16, "residual": BF16, "gain": BF16, "weight": BF16, "bias": BF16, "out": BF16, "total": BF16,
            "x_stride": "i32", "out_stride": "i32", "eps": "fp32", "T": "i32", "N": "i32",
        },
        constants={"K": 2048, "BN": 4, "BK": 2048, "NORM": True, "BIAS": False, "EARLY": early},
        options={"num_warps": 8},
    )  # fmt: skip
    yield Build(
        name="queries_few",
        function=queries.queries_few,
        signature={
            "q": BF16, "raw": BF16, "gain": BF16, "cos": BF16, "sin": BF16, "slots": INT64, "key_up": BF16,
            "pool": BF16, "out": BF16, "q_token": "i32", "q_head": "i32", "raw_token": "i32", "eps": "fp32",
        },
        constants={
            "HEADS": 16, "H2": 16, "RANK": 512, "NOPE": 128, "HALF": 32, "BN": 64, "BLOCKS": 8, "BK": 128, "BLOCK": 512,
            "BLOCK_HALF": 32, "EARLY": early,
        },
        options={"num_warps": 4},
    )  # fmt: skip
    yield Build(
        name="heads_many",
        function=products.heads_many,
        signature={
            "x": BF16, "weight": BF16, "out": BF16, "x_token": "i32", "x_head": "i32", "out_token": "i32",
            "out_head": "i32", "T": "i32",
        },
        constants={"N": 512, "K": 128, "BT": 32, "BN": 128, "BK": 64},
        options={"num_warps": 4, "num_stages": 3},
    )  # fmt: skip
    shapes = {"few": linear_shape(1), "decode": linear_shape(32), "many": linear_shape(512), "wide": WIDE}
    for name, (block, columns, depth, warps, stages) in shapes.items():
        yield Build(
            name=f"linear-blocks-{name}",
            function=products.linear_blocks,
            signature={
                "x": BF16, "weight": BF16, "bias": BF16, "out": BF16, "x_stride": "i32", "out_stride": "i32",
                "T": "i32", "N": "i32",
            },
            constants={
                "K": 2048, "BT": block, "BN": columns, "BK": depth, "BIAS": False,
                "EARLY": early and name in ("few", "decode"),
            },
            options={"num_warps": warps, "num_stages": stages},
        )  # fmt: skip
    yield Build(
        name="choose",
        function=experts.choose,
        signature={"logits": FP32, "bias": FP32, "slots": INT64, "ids": INT64, "weights": FP32, "scale": "fp32"},
        constants={
            "E": 256, "GROUP": 32, "GROUPS": 8, "PAD_GROUP": 32, "PAD_GROUPS": 8, "TOP": 8, "PAD_TOP": 8,
            "TOP_GROUPS": 4, "SIGMOID": True, "BIAS": True, "SUM_OF_TWO": True, "NORMALISE": True, "SLOTS": True,
            "EARLY": early,
        },
        options={"num_warps": 4},
    )  # fmt: skip
    yield Build(
        name="scores",
        function=experts.scores,
        signature={
            "x": BF16, "residual": BF16, "gain": BF16, "weight": FP32, "out": FP32, "normed": BF16, "total": BF16,
            "x_stride": "i32", "eps": "fp32",
        },
        constants={"E": 64, "D": 2048, "BE": 4, "BD": 2048, "NORM": True, "EARLY": early},
        options={"num_warps": 8},
    )  # fmt: skip
    yield Build(
        name="gate_up_few",
        function=experts.gate_up_few,
        signature={"x": BF16, "gate_up": BF16, "shared_gate_up": BF16, "ids": INT64, "act": FP32},
        constants={"E": 64, "TOP": 6, "D": 2048, "I": 1408, "S": 2816, "BI": 2, "BD": 2048, "EARLY": early},
        options={"num_warps": 8},
    )
    yield Build(
        name="down_few",
        function=experts.down_few,
        signature={
            "act": FP32, "down": BF16, "shared_down": BF16, "ids": INT64, "weights": FP32, "out": BF16,
        },
        constants={"E": 64, "TOP": 6, "D": 2048, "I": 1408, "S": 2816, "BN": 4, "BI": 512, "EARLY": early},
        options={"num_warps": 4},
    )  # fmt: skip
    few, columns, depth, warps, stages = grouped_shape(1)
    yield Build(
        name="gate_up_grouped",
        function=experts.gate_up_grouped,
        signature={"x": BF16, "gate_up": BF16, "order": INT32, "starts": INT32, "act": BF16},
        constants={"TOP": 6, "D": 2048, "I": 1408, "BM": few, "BI": columns, "BD": depth},
        options={"num_warps": warps, "num_stages": stages},
    )
    yield Build(
        name="down_grouped",
        function=experts.down_grouped,
        signature={"act": BF16, "down": BF16, "order": INT32, "starts": INT32, "weights": FP32, "part": FP32},
        constants={"D": 2048, "I": 1408, "BM": few, "BN": columns, "BI": depth},
        options={"num_warps": warps, "num_stages": stages},
    )
    logits = {"logits": BF16, "changed": FP32, "changed_row": INT32}
    rows = logits | {"mask_words": INT32, "mask_row": INT32, "temperature": FP64}
    yield Build(
        name="sample-bounds",
        function=sample.bounds,
        signature=rows | {
            "top_k": INT32, "top_p": FP64, "asked": INT32, "stride": "i32", "V": "i32", "best_id": INT32, "best": FP64,
            "least": FP32, "total": FP64, "faulty": INT32,
        },
        constants={"BLOCK": sampling.BLOCK, "BITS": 16, "CHANGED": False},
        options={"num_warps": sampling.WARPS},
    )  # fmt: skip
    yield Build(
        name="sample-draw",
        function=sample.draw,
        signature=rows | {
            "min_p": FP64, "asked": INT32, "state": INT64, "best": FP64, "least": FP32, "stride": "i32", "V": "i32",
            "part_score": FP64, "part_id": INT32, "part_mass": FP64,
        },
        constants={"PARTS": sampling.PARTS, "BLOCK": sampling.DRAW_BLOCK, "CHANGED": False},
        options={"num_warps": sampling.DRAW_WARPS},
    )  # fmt: skip
    yield Build(
        name="sample-pick",
        function=sample.pick,
        signature=logits | {
            "temperature": FP64, "best_id": INT32, "best": FP64, "total": FP64, "part_score": FP64, "part_id": INT32,
            "part_mass": FP64, "asked": INT32, "stride": "i32", "V": "i32", "ids": INT64, "logprob": FP64,
            "draw_logprob": FP64, "top_ids": INT64, "top_logprobs": FP64,
        },
        constants={"PARTS": sampling.PARTS, "BLOCK": sampling.BLOCK, "MOST": sampling.MOST_LOGPROBS, "CHANGED": False},
        options={"num_warps": sampling.WARPS},
    )  # fmt: skip


def _fp8(early: bool) -> Iterator[Build]:
    """Of weights in e4m3 as the Open Compute Project has it (`fn`): gfx942 knows another one and is no target."""
    from agentspeed_kernels.triton import fp8_kernels

    experts = device_module("experts_fp8")
    products = device_module("products_fp8")

    x = {"x": BF16, "weight": FP8, "scales": FP32, "bias": BF16, "out": BF16, "x_stride": "i32", "out_stride": "i32"}
    yield Build(
        name="add_norm_linear-fp8",
        function=products.linear,
        signature=x | {"residual": BF16, "gain": BF16, "total": BF16, "eps": "fp32", "N": "i32"},
        constants={
            "K": 2048, "BN": fp8_kernels.LINEAR_ROWS, "CUTS": 4, "NORM": True, "BIAS": False, "EARLY": early,
        },
        options={"num_warps": fp8_kernels.LINEAR_WARPS},
    )  # fmt: skip
    rows, columns, warps, stages = fp8_kernels.tiled_shape(32, 2048)
    yield Build(
        name="linear_many-fp8",
        function=products.linear_many,
        signature=x | {"T": "i32", "N": "i32"},
        constants={"K": 2048, "BN": columns, "BM": rows, "BIAS": False, "EARLY": early},
        options={"num_warps": warps, "num_stages": stages},
    )
    routed = {"gate_up": FP8, "down": FP8, "scales": FP32, "order": INT32, "starts": INT32, "weights": FP32}
    few = {"shared_gate_up": FP8, "shared_down": FP8, "shared_scales": FP32, "ids": INT64, "act": BF16, "out": BF16}
    sizes = {"E": 64, "TOP": 6, "D": 2048, "I": 1408, "S": 2816, "EARLY": early}
    yield Build(
        name="gate_up_few-fp8",
        function=experts.gate_up_few,
        signature=routed | few | {"x": BF16},
        constants=sizes | {"BI": fp8_kernels.GATE_UP_ROWS, "CUTS": 4},
        options={"num_warps": fp8_kernels.GATE_UP_WARPS},
    )
    yield Build(
        name="down_few-fp8",
        function=experts.down_few,
        signature=routed | few,
        constants=sizes | {"BN": fp8_kernels.DOWN_ROWS, "CUTS": fp8_kernels.DOWN_CUTS},
        options={"num_warps": fp8_kernels.DOWN_WARPS},
    )
    rows, columns, warps, stages = fp8_kernels.grouped_shape(3)
    grouped = {"D": 2048, "I": 1408, "S": 2816, "BM": rows, "EARLY": early}
    yield Build(
        name="gate_up_grouped-fp8",
        function=experts.gate_up_grouped,
        signature=routed | few | {"x": BF16, "shared_act": BF16, "T": "i32"},
        constants=grouped | {"TOP": 6, "BI": columns},
        options={"num_warps": warps, "num_stages": stages},
    )
    yield Build(
        name="down_grouped-fp8",
        function=experts.down_grouped,
        signature=routed | few | {"shared_act": BF16, "part": FP32, "T": "i32", "PAIRS": "i32"},
        constants=grouped | {"BN": columns},
        options={"num_warps": warps, "num_stages": stages},
    )


def _extend(target: str) -> Iterator[Build]:
    from agentspeed_kernels.triton import extend

    device = device_module("extend")

    forms = {"wide": extend.WIDE, "narrow": extend.NARROW}
    if target.startswith("hip"):
        del forms["wide"]
    for name, form in forms.items():
        columns = {"keys": 128, "turned": 64, "values": 128}
        yield Build(
            name=f"extend-{name}",
            function=device.attend_chunk,
            signature={
                "q": BF16, "part": FP32, "part_weight": FP32, "out": BF16, "scale2": "fp32",
                **{key: f"tensordesc<bf16[{form.tokens},{width}]>" for key, width in columns.items()},
                **dict.fromkeys(("q_token", "q_head", "out_token", "out_head", "T", "tokens"), "i32"),
                **dict.fromkeys(("rows_of_head", "before", "seen_first"), "i32"),
            },
            constants={
                "HEADS": 16, "NOPE": 128, "ROPE": 64, "RANK": 512, "VALUE": 128, "WIDE_NOPE": 128, "WIDE_ROPE": 64,
                "WIDE_VALUE": 128, "BM": form.rows, "BN": form.tokens, "PARTS": 1, "CARRY": True, "LAST": True,
            },
            options={"num_warps": form.warps, "num_stages": form.stages},
        )  # fmt: skip


def _grouped(target: str) -> Iterator[Build]:
    """In Qwen3-8B's shapes."""
    from agentspeed_kernels.triton import attention, extend

    grouped = device_module("grouped")

    early = target.startswith("cuda")
    pools = dict.fromkeys(("q", "out"), BF16)
    counts = dict.fromkeys(("q_token", "q_head", "heads", "slots"), "i32")
    forms = [("16", attention.GROUP_16, False), ("16-edge", attention.GROUP_16, True), ("32", attention.GROUP_32, True)]
    if target == "cuda:90":
        forms.append(("64", attention.GROUP_64, True))
    if target.startswith("hip"):
        forms = [("16", attention.GROUP_HIP, False), ("16-edge", attention.GROUP_HIP, True)]
    for name, form, edge in forms:
        tile = f"tensordesc<bf16[{form.tile},128]>"
        yield Build(
            name=f"groups-{name}",
            function=grouped.attend_groups,
            signature=_rows_signature() | counts | {"keys": tile, "values": tile},
            constants={
                "R": form.block_rows, "T": form.tile, "PAGE": 64, "W": 128, "WIDE": 128, "ONE": False, "RUN": False,
                "EDGE": edge, "STAGES": form.stages, "EARLY": early,
            },
            options={"num_warps": form.warps, "num_stages": form.stages},
        )  # fmt: skip
    for name, wide in {"wide": extend.WIDE, "narrow": extend.NARROW}.items():
        if name == "wide" and target.startswith("hip"):
            continue
        tile = f"tensordesc<bf16[{wide.tokens},128]>"
        yield Build(
            name=f"groups-extend-{name}",
            function=grouped.extend_groups,
            signature=pools | {
                "keys": tile, "values": tile, "pages": INT32, "part": FP32, "part_weight": FP32, "scale2": "fp32",
                **dict.fromkeys(("q_token", "q_head", "T", "tokens", "seen_first", "heads"), "i32"),
            },
            constants={"PAGE": 64, "W": 128, "WIDE": 128, "BM": wide.rows, "BN": wide.tokens, "PARTS": 1},
            options={"num_warps": wide.warps, "num_stages": wide.stages},
        )  # fmt: skip
    yield Build(
        name="qkv_append",
        function=grouped.qkv_append,
        signature={
            **dict.fromkeys(("qkv", "q_gain", "k_gain", "cos", "sin", "q", "keys", "values"), BF16), "slots": INT64,
            "qkv_token": "i32", "qkv_head": "i32", "eps": "fp32",
        },
        constants={
            "HEADS": 32, "GROUPS": 8, "HALF": 64, "BLOCK": 64, "BH": 16, "Q_NORM": True, "K_NORM": True,
            "ROW": 1024, "SCALES_AT": 0, "EARLY": early,
        },
        options={"num_warps": 4},
    )  # fmt: skip
    yield Build(
        name="groups-merge",
        function=device_module("rows").merge,
        signature={
            "part": FP32, "part_weight": FP32, "out": BF16, "unit_row": INT32, "table": INT32, "PARTS": "i32",
            "heads": "i32", "slots": "i32",
        },
        constants={
            "UNIT": 4, "RANK": 128, "COLUMNS": 64, "TAKE": 32, "SHOT": True, "GROUPS": 8, "EARLY": early,
        },
        options={"num_warps": 1},
    )  # fmt: skip
