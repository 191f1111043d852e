"""What a checkpoint declares about how its weights are stored, and the refusal by name of what is not implemented."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from agentspeed_engine.errors import EngineFault

FP8_BLOCK = 128
"""Rows and columns that share one scale."""
Scheme = Literal["none", "fp8_blocks", "int4_groups"]
_SUPPORTED = (
    f"Supported are bfloat16, float16 and float32 weights, fp8 e4m3 with a scale for each block of {FP8_BLOCK} × "
    f"{FP8_BLOCK}, and compressed-tensors in 4 bits, packed and symmetric in groups; take such a version of the model."
)
_INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
_SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where tools other than transformers declare it: ModelOpt, GPTQ and AWQ."""
PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|weight_scale|weight_scale_2|weight_zero_point"
    r"|input_scale|absmax|quant_map|quant_state\..+|SCB|weight_format|[kv]_scale|blocks)$"
)
"""Names that only quantised checkpoints have. Of the supported ones, compressed-tensors alone."""


def declared_scheme(raw: Mapping[str, Any], folder: Path | None = None) -> Scheme:
    """Of a config.json (and the files beside it), before any weight is read.

    Raises `EngineFault`: unsupported_model for what is not implemented, bad_config for what says nothing.
    """
    for side in _SIDE_FILES:
        if folder is not None and (folder / side).exists():
            raise _unsupported(f"{side} declares quantised weights")
    declared = _declared(raw)
    if declared is None:
        return "none"
    method = declared.get("quant_method", "mlx" if "bits" in declared else None)
    if method is None:
        raise EngineFault("bad_config", "config.json: quantization_config has no quant_method.", _SUPPORTED)
    if method == "compressed-tensors" and _is_int4_groups(declared):
        return "int4_groups"
    if method != "fp8":
        raise _unsupported(f"the weights are quantised with {method!r}{_details(declared)}")
    _check_fp8(declared)
    return "fp8_blocks"


def stored_as(raw: Mapping[str, Any]) -> tuple[str, bool]:
    """(how the weights of a config.json are stored, empty where it does not say; whether that is quantised), whatever
    of it is implemented. The text part's own format counts before that of the whole."""
    declared = _declared(raw)
    if declared is not None:
        return str(declared.get("quant_method", "quantised")), True
    for holder in reversed(_holders(raw)):
        named = holder.get("dtype") or holder.get("torch_dtype")
        if isinstance(named, str):
            return named, False
    return "", False


def packed_refusal(name: str) -> EngineFault:
    """For a tensor that `PACKED` knows, where the configuration said nothing of it."""
    return _unsupported(f"the weights are quantised ({name}), though config.json declares nothing about it")


def torn_block(
    name: str, extent: int, ranks: int, stored: str = f"fp8 in blocks of {FP8_BLOCK} × {FP8_BLOCK}"
) -> EngineFault:
    """For a cut that goes through a block, whose one scale two ranks would need."""
    return EngineFault(
        "bad_config",
        f"{name} is {stored}, and {extent} over {ranks} ranks are {extent // ranks}: the cut goes through a block.",
        "Choose a mesh of fewer ranks on that axis.",
    )


def _declared(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of the model or of its text part; null and an empty object declare nothing. Under `quantization` MLX writes it,
    and names no method."""
    for holder in _holders(raw):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = holder.get(key)
            if not found:
                continue
            if not isinstance(found, Mapping):
                raise EngineFault(
                    "bad_config", f"config.json: {key} is {found!r}, not an object.", "Write it as an object or null."
                )
            return found
    return None


def _holders(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The model, and its text part where it has one."""
    text = raw.get("text_config")
    return (raw, text) if isinstance(text, Mapping) else (raw,)


def _check_fp8(declared: Mapping[str, Any]) -> None:
    block = declared.get("weight_block_size")
    if block is None:
        raise _unsupported("the weights are fp8 without weight_block_size, which is one scale for a whole tensor")
    if list(block if isinstance(block, (list, tuple)) else [block]) != [FP8_BLOCK, FP8_BLOCK]:
        raise _unsupported(f"the weights are fp8 with weight_block_size {block!r}")
    for key, known in (
        ("fmt", ("e4m3",)),
        ("activation_scheme", ("dynamic",)),
        ("scale_fmt", ("float", "ue8m0")),
        ("expert_dtype", ("fp8",)),
    ):
        value = declared.get(key)
        if value is not None and value not in known:
            raise _unsupported(f"the weights are fp8 with {key} {value!r}")


def _is_int4_groups(declared: Mapping[str, Any]) -> bool:
    """Whether all that is quantised is weights, as `int4_groups` reads them."""
    groups = declared.get("config_groups")
    if declared.get("format") != "pack-quantized" or not isinstance(groups, Mapping) or not groups:
        return False
    return declared.get("kv_cache_scheme") is None and all(map(_is_int4_group, groups.values()))


def _is_int4_group(group: object) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        return False
    alone = group.get("input_activations") is None and group.get("output_activations") is None
    return alone and not _unlike_int4(weights)


def _unlike_int4(weights: Mapping[str, Any]) -> dict[str, Any]:
    """What a group says of its weights that is not as `int4_groups` reads them."""
    other = {key: weights.get(key) for key, value in _INT4.items() if weights.get(key) != value}
    return other | {key: weights[key] for key in ("actorder", "dynamic") if weights.get(key)}


def _details(declared: Mapping[str, Any]) -> str:
    """The few words of a declaration by which people know it."""
    words = [f"{key} {declared[key]}" for key in ("format", "bits", "group_size", "load_in_4bit") if key in declared]
    groups = declared.get("config_groups")
    if declared.get("format") == "pack-quantized" and isinstance(groups, Mapping):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            other = _unlike_int4(weights) if isinstance(weights, Mapping) else {}
            words += [f"{key} {value}" for key, value in other.items() if f"{key} {value}" not in words]
    return f" ({', '.join(words)})" if words else ""


def _unsupported(what: str) -> EngineFault:
    return EngineFault("unsupported_model", f"This quantisation is not supported: {what}.", _SUPPORTED)
