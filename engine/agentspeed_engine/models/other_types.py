"""Model types that do not run: what they are, what of them is missing here, and the nearest family that runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WINDOWS = "sliding-window attention, which cannot go back to any token"
_RECURRENT = "recurrent state, which cannot go back to any token"
KNOWN: dict[str, tuple[str, str]] = {
    "deepseek": ("a DeepSeek-MoE with multi-head attention, whose routing is not implemented", "qwen3_moe"),
    "deepseek_v4": ("a DeepSeek-V4 compresses its cache along the tokens, which is not implemented", "deepseek_v3"),
    "glm4": ("a GLM-4 turns a part of each head and norms after its layers, which is not implemented", "llama"),
    "glm4_moe": ("a GLM-4.6 turns a part of each head, which is not implemented", "qwen3_moe"),
    "qwen2_moe": ("a Qwen2-MoE has biases on queries and a gated shared expert, which is not implemented", "qwen3_moe"),
    "qwen3_next": (f"a Qwen3-Next has {_RECURRENT}", "qwen3_moe"),
    "qwen3_5": (f"a Qwen3.5 has {_RECURRENT}", "qwen3"),
    "qwen3_5_moe": (f"a Qwen3.5-MoE has {_RECURRENT}", "qwen3_moe"),
    "qwen3_vl": ("a Qwen3-VL reads images, and its positions have three axes, which is not implemented", "qwen3"),
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
    "kimi_linear": (f"a Kimi Linear has {_RECURRENT}", "kimi_k2"),
    "minimax_m2": ("a MiniMax-M2 norms all heads together, which is not implemented", "qwen3_moe"),
    "mamba": (f"a Mamba has {_RECURRENT}", ""),
    "mamba2": (f"a Mamba 2 has {_RECURRENT}", ""),
    "jamba": (f"a Jamba has {_RECURRENT}", ""),
}
"""By `model_type`: (what is missing, the nearest type that runs or nothing)."""


def missing(raw: Mapping[str, Any]) -> tuple[str, str]:
    """(What is missing, as the end of a sentence; the nearest `model_type` that runs, or nothing).

    A type that nobody has listed is told by the fields of its configuration.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        return "config.json does not say which architecture it is", ""
    if kind in KNOWN:
        return KNOWN[kind]
    if isinstance(raw.get("text_config"), Mapping):
        inner = raw["text_config"].get("model_type")
        return f"it holds a language model ({inner!r}) among others, which is not implemented", ""
    routed = any(raw.get(name) for name in ("n_routed_experts", "num_experts", "num_local_experts"))
    if raw.get("kv_lora_rank"):
        return "it has multi-head latent attention, but nobody checked this architecture", "deepseek_v3"
    if raw.get("is_encoder_decoder"):
        return "it is an encoder with a decoder, and only decoders run", ""
    if raw.get("num_key_value_heads"):
        near = "qwen3_moe" if routed else "llama"
        return "it has grouped-query attention, but nobody checked this architecture", near
    return "nobody implemented this architecture", ""
