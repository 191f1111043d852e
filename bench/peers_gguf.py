"""Writes a checkpoint of DeepSeek-V3 or Qwen3 as the GGUF file that llama.cpp reads, without llama.cpp's tools.

    python bench/peers_gguf.py .checkpoints/v3-50m-bfloat16 .checkpoints/v3-50m-bfloat16/model.gguf

Every matrix keeps its bits (bfloat16 or float32); vectors and the router are float32, as llama.cpp wants them. The
up-projection of latents is cut by head into that of keys, transposed, and that of values: llama.cpp then attends to
latents, and keeps nothing else in its cache. It rotates neighbours for the one architecture, as `rope_interleave` says,
and halves for the other, so no rows change places. Format: GGUF 3 (ggml's docs/gguf.md); names and keys: llama.cpp's
architectures `deepseek2` and `qwen3`.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {"deepseek_v3": "deepseek2", "qwen3": "qwen3"}
"""By model type."""
ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""Types of a value."""
TENSOR_TYPES = {torch.float32: 0, torch.bfloat16: 30}
SIGMOID = 2
NORMAL, CONTROL = 1, 3
"""Kinds of token."""
OF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class Inconvertible(ValueError):
    """A model type, or a tensor of it, that this file knows no name of llama.cpp's for."""


def write_gguf(folder: Path, out: Path) -> None:
    """Raises `Inconvertible`."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        raise Inconvertible(
            f"{config['model_type']} is none of {', '.join(ARCHITECTURES)}: add its names to {__file__}"
        )
    weights = load_file(str(folder / "model.safetensors"))
    file = File(ARCHITECTURES[config["model_type"]], dict(converted(weights, config)))
    describe(file, config)
    if file.architecture == "deepseek2":
        describe_latents_and_experts(file, config)
    vocabulary(file, json.loads((folder / "tokenizer.json").read_text()), config)
    out.write_bytes(file.packed())


def converted(weights: dict[str, Tensor], config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as llama.cpp names and shapes it. Raises `Inconvertible`."""
    for name, tensor in weights.items():
        if name in WHOLE:
            yield WHOLE[name], _kept(WHOLE[name], tensor)
            continue
        _, _, layer, *rest = name.split(".")
        block, inner = f"blk.{layer}.", ".".join(rest)
        if inner in OF_LAYER:
            yield block + OF_LAYER[inner], _kept(OF_LAYER[inner], tensor)
        elif inner == "self_attn.kv_b_proj.weight":
            of_keys = config["qk_nope_head_dim"]
            heads = tensor.view(config["num_attention_heads"], of_keys + config["v_head_dim"], tensor.shape[1])
            yield f"{block}attn_k_b.weight", heads[:, :of_keys].transpose(1, 2).contiguous()
            yield f"{block}attn_v_b.weight", heads[:, of_keys:].contiguous()
        elif inner.startswith("mlp.experts.0."):
            side = rest[3].removesuffix("_proj")
            of_all = [f"model.layers.{layer}.mlp.experts.{one}.{side}_proj.weight" for one in range(_experts(config))]
            yield f"{block}ffn_{side}_exps.weight", torch.stack([weights[one] for one in of_all])
        elif not inner.startswith("mlp.experts."):
            raise Inconvertible(f"{name}: no tensor of llama.cpp's is known for it")


def _experts(config: dict[str, Any]) -> int:
    return int(config["n_routed_experts"])


def _kept(name: str, tensor: Tensor) -> Tensor:
    """Vectors and the router in float32: llama.cpp adds and multiplies them as they are."""
    return tensor.float() if tensor.dim() == 1 or name == "ffn_gate_inp.weight" else tensor


@final
@dataclass(slots=True)
class File:
    """What a GGUF file holds; `packed` are its bytes."""

    architecture: str
    tensors: dict[str, Tensor]
    values: dict[str, bytes] = field(default_factory=dict)

    def put(self, kind: int, **values: Any) -> None:
        """Of the architecture; a double underscore in a key stands for a dot."""
        for key, value in values.items():
            self.say(f"{self.architecture}.{key.replace('__', '.')}", kind, value)

    def say(self, key: str, kind: int, value: Any) -> None:
        self.values[key] = struct.pack("<I", kind) + _value(kind, value)

    def say_all(self, key: str, kind: int, values: list[Any]) -> None:
        self.values[key] = struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(_value(kind, one) for one in values)

    def packed(self) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.values))]
        parts += [_value(STRING, key) + value for key, value in self.values.items()]
        data, at = list[bytes](), 0
        for name, tensor in self.tensors.items():
            shape = tuple(reversed(tensor.shape))
            parts.append(_value(STRING, name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            parts.append(struct.pack("<IQ", TENSOR_TYPES[tensor.dtype], at))
            data.append(_padded(tensor.contiguous().view(torch.uint8).numpy().tobytes()))
            at += len(data[-1])
        return b"".join([_padded(b"".join(parts)), *data])


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        said = str(value).encode()
        return struct.pack("<Q", len(said)) + said
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def describe(file: File, config: dict[str, Any]) -> None:
    """What every decoder has, in llama.cpp's words."""
    file.say("general.architecture", STRING, file.architecture)
    file.say("general.name", STRING, "random")
    file.put(
        UINT32,
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        embedding_length=config["hidden_size"],
        block_count=config["num_hidden_layers"],
        feed_forward_length=config["intermediate_size"],
        attention__head_count=config["num_attention_heads"],
    )
    file.put(FLOAT32, attention__layer_norm_rms_epsilon=config["rms_norm_eps"], rope__freq_base=config["rope_theta"])
    if "head_dim" in config:
        file.put(
            UINT32,
            attention__head_count_kv=config["num_key_value_heads"],
            attention__key_length=config["head_dim"],
            attention__value_length=config["head_dim"],
        )


def describe_latents_and_experts(file: File, config: dict[str, Any]) -> None:
    """Attention to latents is one key head of rank + rope."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    file.put(
        UINT32,
        attention__head_count_kv=1,
        attention__q_lora_rank=config["q_lora_rank"],
        attention__kv_lora_rank=rank,
        attention__key_length=rank + rope,
        attention__value_length=rank,
        attention__key_length_mla=config["qk_nope_head_dim"] + rope,
        attention__value_length_mla=config["v_head_dim"],
        rope__dimension_count=rope,
        leading_dense_block_count=config["first_k_dense_replace"],
        expert_count=_experts(config),
        expert_used_count=config["num_experts_per_tok"],
        expert_shared_count=config["n_shared_experts"],
        expert_feed_forward_length=config["moe_intermediate_size"],
        expert_gating_func=SIGMOID,
    )
    file.put(FLOAT32, expert_weights_scale=config["routed_scaling_factor"])
    file.put(BOOL, expert_weights_norm=config["norm_topk_prob"])


def vocabulary(file: File, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Byte-level BPE, which llama.cpp calls gpt2."""
    model = tokenizer["model"]
    ids = model["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    file.say("tokenizer.ggml.model", STRING, "gpt2")
    file.say("tokenizer.ggml.pre", STRING, "gpt-2")
    file.say_all("tokenizer.ggml.tokens", STRING, tokens)
    file.say_all("tokenizer.ggml.token_type", INT32, [CONTROL if ids[one] in special else NORMAL for one in tokens])
    file.say_all("tokenizer.ggml.merges", STRING, merges)
    file.say("tokenizer.ggml.bos_token_id", UINT32, config["bos_token_id"])
    file.say("tokenizer.ggml.eos_token_id", UINT32, config["eos_token_id"])
    file.say("tokenizer.ggml.add_bos_token", BOOL, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write_gguf(options.folder, options.out)


if __name__ == "__main__":
    main()
