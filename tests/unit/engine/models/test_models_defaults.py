"""A field that config.json leaves out means what the published modelling code means by it, or is refused by name."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.models.config import parse
from agentspeed_engine.models.families.deepseek.config import DeepseekConfig
from agentspeed_engine.models.families.grouped.config import GroupedConfig
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.rope_config import Yarn
from tests.support.needs import needed
from tests.support.paged import CONFIG

transformers = needed("transformers", "transformers is the reference")

V2 = {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False}
GROUPED: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16, "rms_norm_eps": 1e-3,
    "rope_theta": 5000.0, "attention_bias": True, "tie_word_embeddings": True, "hidden_act": "silu",
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 2,
    "norm_topk_prob": True, "mlp_only_layers": [1],
}  # fmt: skip
"""Every value is another than the default."""
CLASSES = {
    "deepseek_v2": "DeepseekV2Config", "deepseek_v3": "DeepseekV3Config", "glm4_moe_lite": "Glm4MoeLiteConfig",
    "youtu": "YoutuConfig", "llama": "LlamaConfig", "qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig",
}  # fmt: skip


def full_config(model_type: str) -> dict[str, Any]:
    """Nothing left out, and experts for eight groups, which is the default of some."""
    if model_type in ("llama", "qwen3", "qwen3_moe"):
        return GROUPED | {"model_type": model_type}
    config = CONFIG | {"model_type": model_type, "n_routed_experts": 64, "rms_norm_eps": 1e-3, "num_hidden_layers": 5}
    if model_type == "deepseek_v2":
        return config | V2
    if model_type == "youtu":
        return {name: value for name, value in config.items() if "expert" not in name and "group" not in name}
    return config


def seen(config: Any) -> dict[str, Any]:
    """What of our configuration has a name in the reference's."""
    found: dict[str, Any] = {
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "rope_theta": config.rope.theta,
    }
    if isinstance(config, DeepseekConfig) and config.model_type != "deepseek_v2":
        found["rope_interleave"] = config.interleaved
    if isinstance(config, GroupedConfig):
        found |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head}
    moe = config.moe
    if moe is not None:
        found |= {"num_experts_per_tok": moe.top, "norm_topk_prob": moe.normalise}
        if isinstance(config, DeepseekConfig):
            found |= {"routed_scaling_factor": moe.scale, "n_shared_experts": moe.shared}
            if config.model_type != "deepseek_v2" or moe.groups > 1:  # greedy choices know no groups
                found |= {"n_group": moe.groups, "topk_group": moe.top_groups}
            dense = [layer for layer in range(config.layers) if layer not in moe.layers]
            found["dense layers"] = dense
    return found


def seen_of_reference(model_type: str, raw: dict[str, Any]) -> dict[str, Any]:
    theirs = getattr(transformers, CLASSES[model_type]).from_dict(copy.deepcopy(raw))
    kinds = getattr(theirs, "mlp_layer_types", None)
    first = getattr(theirs, "first_k_dense_replace", None)
    layers = range(theirs.num_hidden_layers)
    dense = [layer for layer in layers if (kinds[layer] == "dense" if kinds else layer < (first or 0))]
    return {**theirs.to_dict(), "rope_theta": theirs.rope_parameters["rope_theta"], "dense layers": dense}


@pytest.mark.parametrize("model_type", CLASSES)
def test_any_field_left_out_means_what_the_reference_means_or_is_refused(model_type: str) -> None:
    whole = full_config(model_type)
    for name in set(whole) - {"model_type"}:
        raw = {key: value for key, value in whole.items() if key != name}
        try:
            ours = seen(parse(raw))
        except EngineFault as fault:
            assert fault.code == "bad_config" and name in fault.message and fault.remedy, name
            continue
        theirs = seen_of_reference(model_type, raw)
        if ours.get("head_dim") is not None and theirs.get("head_dim") is None:
            theirs["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
        assert ours == {key: theirs[key] for key in ours}, name


NULL_IS_A_VALUE = {
    "q_lora_rank", "n_routed_experts", "num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id",
    "n_shared_experts", "num_nextn_predict_layers", "first_k_dense_replace", "rope_theta", "mlp_only_layers",
    "architectures",
}  # fmt: skip
"""Null has a meaning there: none, 0, or as many as the heads."""


@pytest.mark.parametrize("model_type", CLASSES)
def test_null_is_no_default(model_type: str) -> None:
    """The reference takes a null flag as false and a null number as nothing; a default in its place would be wrong."""
    whole = full_config(model_type)
    for name in set(whole) - {"model_type"} - NULL_IS_A_VALUE:
        try:
            changed = parse(whole | {name: None})
        except EngineFault as fault:
            assert name in fault.message, name
        else:  # a field that this family does not read
            assert seen(changed) == seen(parse(whole)), name


YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
ROPE: list[dict[str, Any]] = [
    {"rope_scaling": YARN, "rope_theta": 5e4, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    {"rope_scaling": None, "rope_theta": 5e4, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    {"rope_scaling": {}, "rope_theta": 5e4},
    {"rope_parameters": {"rope_theta": 7e4, **YARN}},
    {"rope_parameters": YARN, "rope_theta": 5e4},
    {"rope_scaling": YARN | {"rope_theta": 9e4}, "rope_theta": 5e4},
    {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    {"rope_scaling": YARN | {"rope_type": "default"}},
    {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": None, "attention_factor": None, "mscale": 0}},
]


@pytest.mark.parametrize("fields", ROPE, ids=str)
def test_both_namings_of_rope_are_read_as_the_reference_reads_them(fields: dict[str, Any]) -> None:
    raw = {key: value for key, value in CONFIG.items() if key != "rope_theta"} | fields
    ours = parse(raw).rope
    theirs = transformers.DeepseekV3Config.from_dict(copy.deepcopy(raw)).rope_parameters
    assert ours.theta == theirs["rope_theta"]
    assert (ours.scaling is not None) == (theirs["rope_type"] == "yarn")
    if isinstance(ours.scaling, Yarn):
        assert ours.scaling.original_context == theirs["original_max_position_embeddings"]
        assert ours.scaling.factor == theirs["factor"]


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, 1.1386294),
        ({"attn_factor": 0.8782488562869419}, 1.0),
        ({"attn_factor": None}, 1.1386294),
        ({"attn_factor": 0.5, "attention_factor": 1.2}, 1.2),
    ],
    ids=str,
)
def test_a_factor_of_yarn_is_multiplied_by_what_its_makers_publish_beside_it(
    fields: dict[str, Any], factor: float
) -> None:
    """DeepSeek-R1-0528-Qwen3-8B takes back what yarn puts on scores. The angle of position 0 has a cosine of 1."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **fields}
    config = parse(GROUPED | {"model_type": "qwen3", "rope_scaling": yarn})
    cos, _ = Rope(config.rope, config.context_limit, torch.float64).at(torch.tensor([0]))
    assert torch.allclose(cos, torch.full_like(cos, factor), rtol=1e-6)


REFUSED_ROPE: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": "yarn"}, "rope_scaling is not an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each kind of layer its own (full_attention)"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is not supported"),
    ({"rope_scaling": YARN, "original_max_position_embeddings": 128}, "is 128, and 64 where RoPE is described"),
    ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta is 1"),
    ({"rope_scaling": YARN | {"beta_fast": 5e-324}}, "beta_fast is 5e-324"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED_ROPE, ids=[case[1] for case in REFUSED_ROPE])
def test_a_rotary_embedding_that_is_not_implemented_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineFault) as caught:
        parse(CONFIG | fields)
    assert words in caught.value.message


HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 10**9, 10**400, 0.0, 1e-300, 1.5, float("nan"), float("inf"), "", "yarn", "silu",
    [], [None], [1, 2], ["dense"], [[]], {}, {"type": "yarn"}, {"type": []}, {"type": "yarn", "factor": []},
    {"a": {"b": 1}}, {"quant_method": []}, {"quant_method": "fp8", "weight_block_size": {}}, {"model_type": "kimi_k2"},
]  # fmt: skip
MORE = ("rope_scaling", "rope_parameters", "quantization_config", "compression_config", "text_config", "layer_types",
        "mlp_layer_types", "use_sliding_window", "partial_rotary_factor", "eos_token_id", "model_type",
        "moe_layer_freq", "original_max_position_embeddings", "mlp_bias", "topk_method", "scoring_func")  # fmt: skip


@pytest.mark.parametrize("model_type", [*CLASSES, "kimi_k2", "kimi_k25"])
def test_whatever_a_configuration_holds_is_read_or_refused_with_a_remedy(model_type: str) -> None:
    chance = random.Random(model_type)
    whole = full_config(model_type)
    if model_type == "kimi_k25":
        whole = {"model_type": model_type, "text_config": full_config("deepseek_v3"), **whole}
    for _ in range(400):
        raw = dict(whole)
        for name in chance.sample([*whole, *MORE], chance.choice([1, 1, 2, 3])):
            raw[name] = chance.choice(HOSTILE)
        try:
            parsed = parse(raw, {"eos_token_id": chance.choice(HOSTILE)})
        except EngineFault as fault:
            assert fault.code in ("bad_config", "unsupported_model") and fault.message and fault.remedy, raw
        else:
            Rope(parsed.rope, 8, torch.float32)
