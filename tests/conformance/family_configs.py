"""Random small configurations of every family, as config.json has them, for comparison with the published code."""

from __future__ import annotations

import random
from typing import Any

YARN: dict[str, Any] = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
ARCHITECTURE = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "kimi_k25": "Kimi_K25ForConditionalGeneration",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "youtu": "YoutuForCausalLM",
    "youtu_llm": "YoutuForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""The class of transformers by `model_type`."""
SPARSE = ("deepseek_v32", "glm_moe_dsa")
"""Their rows read fewer tokens than the tests' contexts have."""


def random_config(model_type: str, seed: int) -> dict[str, Any]:
    """Sizes, options and absent fields by chance; the same seed gives the same configuration."""
    chance = random.Random(f"{model_type} {seed}")
    config: dict[str, Any] = {
        "model_type": model_type, "architectures": [ARCHITECTURE[model_type]], "vocab_size": 300,
        "hidden_act": "silu", "max_position_embeddings": 4096, "bos_token_id": 256, "eos_token_id": 257,
        "hidden_size": chance.choice([32, 48, 64]), "intermediate_size": chance.choice([40, 64, 72]),
        "num_hidden_layers": chance.choice([2, 3]), "rope_theta": chance.choice([5000.0, 10000.0, 1e6]),
        "tie_word_embeddings": chance.random() < 0.3, "attention_bias": chance.random() < 0.3,
    }  # fmt: skip
    if chance.random() < 0.6:
        config["rms_norm_eps"] = chance.choice([1e-5, 1e-6])
    if model_type == "kimi_k25":
        text = random_config("kimi_k2", seed) | {"tie_word_embeddings": False}
        return _with_vision(text)
    if model_type in ("llama", "qwen2", "qwen3", "qwen3_moe"):
        return config | _grouped(model_type, config, chance)
    return config | _latent(model_type, config, chance)


def _grouped(model_type: str, config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    groups = chance.choice([1, 2, 4])
    found: dict[str, Any] = {
        "num_key_value_heads": groups, "num_attention_heads": groups * chance.choice([1, 2, 3]),
        "head_dim": chance.choice([8, 12, 16]), "rope_scaling": chance.choice([None, None, YARN, LLAMA3]),
    }  # fmt: skip
    found["hidden_size"] = found["num_attention_heads"] * 8
    if model_type in ("llama", "qwen2") and chance.random() < 0.4:
        del found["head_dim"]
    if model_type == "qwen3_moe":
        found |= {
            "num_experts": chance.choice([4, 6, 8]), "num_experts_per_tok": chance.choice([1, 2, 3]),
            "moe_intermediate_size": chance.choice([16, 24]), "decoder_sparse_step": chance.choice([1, 1, 2]),
            "mlp_only_layers": chance.choice([[], [0]]), "norm_topk_prob": chance.random() < 0.6,
        }  # fmt: skip
    return found


def _latent(model_type: str, config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    heads = chance.choice([2, 4])
    scaled = YARN | chance.choice([{}, {"mscale": 0.8, "mscale_all_dim": 1.2}, {"mscale": 1.0, "mscale_all_dim": 1.0}])
    found: dict[str, Any] = {
        "num_attention_heads": heads, "num_key_value_heads": heads, "kv_lora_rank": chance.choice([16, 24]),
        "q_lora_rank": chance.choice([None, 20]), "qk_rope_head_dim": chance.choice([4, 8]),
        "qk_nope_head_dim": chance.choice([8, 12]), "v_head_dim": chance.choice([8, 10, 26]),
        "rope_scaling": chance.choice([None, scaled]),
    }  # fmt: skip
    if model_type in SPARSE:
        found |= {
            "q_lora_rank": 20, "index_n_heads": chance.choice([16, 24]), "index_head_dim": chance.choice([8, 12]),
            "index_topk": chance.choice([12, 40, 70]),
        }  # fmt: skip
    elif model_type != "deepseek_v2" and chance.random() < 0.5:
        found["rope_interleave"] = chance.random() < 0.5
    if model_type in ("youtu", "youtu_llm"):
        return found
    groups = chance.choice([1, 2, 4])
    found |= {
        "n_routed_experts": 8, "num_experts_per_tok": chance.choice([1, 2]),
        "moe_intermediate_size": chance.choice([16, 24]), "n_group": groups, "topk_group": max(1, groups // 2),
        "n_shared_experts": chance.choice([0, 1, 2]),
    }  # fmt: skip
    if chance.random() < 0.5:
        found["routed_scaling_factor"] = 1.7
    if model_type == "deepseek_v2":
        found["topk_method"] = chance.choice(["greedy", "group_limited_greedy"])
        found["norm_topk_prob"] = False
    elif chance.random() < 0.5:
        found["norm_topk_prob"] = chance.random() < 0.5
    if model_type == "glm_moe_dsa" and chance.random() < 0.7:
        layers = config["num_hidden_layers"]
        found["indexer_types"] = ["full", *(chance.choice(["full", "shared"]) for _ in range(layers - 1))]
    if model_type == "glm4_moe_lite":
        kinds = ["dense" if chance.random() < 0.4 else "sparse" for _ in range(config["num_hidden_layers"])]
        found["mlp_layer_types"] = chance.choice([None, kinds])
    else:
        found["first_k_dense_replace"] = chance.choice([0, 1, config["num_hidden_layers"]])
    return found


def _with_vision(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "kimi_k25", "architectures": [ARCHITECTURE["kimi_k25"]], "tie_word_embeddings": False,
        "eos_token_id": 257, "text_config": text,
        "vision_config": {
            "model_type": "kimi_k25_vision", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32,
            "num_attention_heads": 2, "pos_emb_height": 4, "pos_emb_width": 4,
        },
        "projection_hidden_size": 32, "image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292,
        "vision_end_token_id": 293,
    }  # fmt: skip
