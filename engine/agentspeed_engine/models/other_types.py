"""Model types that do not run: what they are, what of them is missing here, and the nearest family that runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

_WINDOWS = "sliding-window attention, which cannot go back to any token"
_RECURRENT = "recurrent state, which cannot go back to any token"
_THREE_AXES = "reads images, and its positions have three axes, which is not implemented"
KNOWN: dict[str, tuple[str, str]] = {
    "deepseek": ("a DeepSeek-MoE with multi-head attention, whose routing is not implemented", "qwen3_moe"),
    "deepseek_v4": ("a DeepSeek-V4 compresses its cache along the tokens, which is not implemented", "deepseek_v3"),
    "glm4": ("a GLM-4 turns a part of each head and norms after its layers, which is not implemented", "llama"),
    "glm4_moe": ("a GLM-4.6 turns a part of each head, which is not implemented", "qwen3_moe"),
    "qwen2_moe": ("a Qwen2-MoE has biases on queries and a gated shared expert, which is not implemented", "qwen3_moe"),
    "qwen3_next": (f"a Qwen3-Next has {_RECURRENT}", "qwen3_moe"),
    "qwen3_5": (f"a Qwen3.5 has {_RECURRENT}", "qwen3"),
    "qwen3_5_moe": (f"a Qwen3.5-MoE has {_RECURRENT}", "qwen3_moe"),
    "qwen3_5_text": (f"a Qwen3.5 has {_RECURRENT}", "qwen3"),
    "qwen3_5_moe_text": (f"a Qwen3.5-MoE has {_RECURRENT}", "qwen3_moe"),
    "qwen2_vl": (f"a Qwen2-VL {_THREE_AXES}", "qwen2"),
    "qwen2_5_vl": (f"a Qwen2.5-VL {_THREE_AXES}", "qwen2"),
    "qwen3_vl": (f"a Qwen3-VL {_THREE_AXES}", "qwen3"),
    "qwen3_vl_moe": (f"a Qwen3-VL-MoE {_THREE_AXES}", "qwen3_moe"),
    "mistral": ("a Mistral is a Llama that may have " + _WINDOWS, "llama"),
    "ministral": (f"a Ministral has {_WINDOWS}", "llama"),
    "mixtral": ("a Mixtral names its experts otherwise and may have " + _WINDOWS, "qwen3_moe"),
    "gemma": ("a Gemma scales its embeddings and norms otherwise, which is not implemented", "llama"),
    "gemma2": (f"a Gemma 2 has {_WINDOWS}, and caps its scores", "llama"),
    "gemma3": (f"a Gemma 3 has {_WINDOWS}", "llama"),
    "gemma3_text": (f"a Gemma 3 has {_WINDOWS}", "llama"),
    "gpt_oss": (f"a gpt-oss has {_WINDOWS}, and attention sinks", "qwen3_moe"),
    "phi3": ("a Phi-3 joins its matrices and may have " + _WINDOWS, "llama"),
    "llama4": ("a Llama 4 attends in chunks, which cannot go back to any token", "llama"),
    "llama4_text": ("a Llama 4 attends in chunks, which cannot go back to any token", "llama"),
    "mllama": ("a Llama 3.2 Vision attends to images, which is not implemented", "llama"),
    "smollm3": ("a SmolLM3 gives some layers no positions, which is not implemented", "llama"),
    "olmo2": ("an OLMo 2 norms after its layers, which is not implemented", "llama"),
    "granite": ("a Granite scales embeddings, scores and what layers add, which is not implemented", "llama"),
    "phi": ("a Phi turns a part of each head and has other norms, which is not implemented", "llama"),
    "cohere": ("a Command R computes both halves of a layer from one norm, which is not implemented", "llama"),
    "gpt2": ("a GPT-2 learns its positions, which is not implemented", "llama"),
    "kimi_linear": (f"a Kimi Linear has {_RECURRENT}", "kimi_k2"),
    "minimax_m2": ("a MiniMax-M2 norms all heads together, which is not implemented", "qwen3_moe"),
    "mamba": (f"a Mamba has {_RECURRENT}", ""),
    "mamba2": (f"a Mamba 2 has {_RECURRENT}", ""),
    "jamba": (f"a Jamba has {_RECURRENT}", ""),
}
"""By `model_type`: (what is missing, the nearest type that runs or nothing)."""


_PARTS: Final = ("text_config", "language_config", "llm_config", "thinker_config")
"""Where a model that reads more than text has its language model."""
_RECURRENT_KINDS: Final = ("linear", "mamba", "recurrent", "conv", "ssm", "delta", "kda", "lstm", "rwkv")
"""In names of kinds of layers."""
_RECURRENT_FIELDS: Final = re.compile(
    r"(mamba|ssm|rwkv|lstm)_.+|linear_(attn_config|num_key_heads|key_head_dim)|hybrid_override_pattern|lru_width"
    r"|conv_L_cache|conv_kernel|state_size"
)


def missing(raw: Mapping[str, Any], running: Collection[str]) -> tuple[str, str]:
    """(What is missing, as the end of a sentence; the nearest `model_type` that runs, or nothing).

    `running`: every type that runs. A type that nobody has listed is told by the fields of its configuration.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        return "config.json does not say which architecture it is", ""
    if kind in KNOWN:
        return KNOWN[kind]
    parts = (raw.get(name) for name in _PARTS)
    part = next((found for found in parts if isinstance(found, Mapping)), None)
    return _by_fields(raw) if part is None else _by_part(part, running)


def _by_part(part: Mapping[str, Any], running: Collection[str]) -> tuple[str, str]:
    kind = part.get("model_type")
    told = f"it holds a language model{f' ({kind!r})' if kind else ''} among others, which is not implemented"
    if isinstance(kind, str) and kind in running:
        return told, kind
    if isinstance(kind, str) and kind in KNOWN:
        what, near = KNOWN[kind]
        return f"{told}, and {what}", near
    lack = _lack(part)
    return (f"{told}, and it has {lack}" if lack else told), _near(part)


def _by_fields(raw: Mapping[str, Any]) -> tuple[str, str]:
    near = _near(raw)
    lack = _lack(raw)
    if raw.get("is_encoder_decoder"):
        return "it is an encoder with a decoder, and only decoders run", ""
    if lack:
        return f"it has {lack}", near
    if any(isinstance(raw.get(name), Mapping) for name in ("vision_config", "audio_config")):
        return "it reads more than text, which is not implemented", near
    if not near:
        return "nobody implemented this architecture", ""
    attention = "multi-head latent" if raw.get("kv_lora_rank") else "grouped-query"
    return f"it has {attention} attention, but nobody checked this architecture", near


def _near(raw: Mapping[str, Any]) -> str:
    """By its attention, which decides most of what a model needs."""
    if raw.get("kv_lora_rank"):
        return "deepseek_v3"
    routed = any(raw.get(name) for name in ("n_routed_experts", "num_experts", "num_local_experts"))
    return ("qwen3_moe" if routed else "llama") if raw.get("num_key_value_heads") else ""


def _lack(raw: Mapping[str, Any]) -> str:
    """What of its layers cannot go back to any token; mostly nothing."""
    listed = raw.get("layer_types")
    kinds = " ".join(kind for kind in listed if isinstance(kind, str)) if isinstance(listed, list) else ""
    if any(word in kinds for word in _RECURRENT_KINDS) or any(
        value and _RECURRENT_FIELDS.fullmatch(name) for name, value in raw.items()
    ):
        return _RECURRENT
    if "chunk" in kinds or raw.get("attention_chunk_size"):
        return "attention in chunks, which cannot go back to any token"
    if "sliding" in kinds or (raw.get("sliding_window") and raw.get("use_sliding_window", True)):
        return _WINDOWS
    return ""
