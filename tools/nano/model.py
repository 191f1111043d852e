"""The network of nano as it is trained, and its export to a Hugging Face `deepseek_v3` folder and back.

Training computes every expert for every token and multiplies by the routing weights: with four small experts two large
matrix products are faster than gathering tokens. The result is the one of the sparse form.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tools.nano.format import CONTEXT, VOCAB_SIZE

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """The numbers that end up in config.json."""

    vocab: int = VOCAB_SIZE
    hidden: int = 256
    layers: int = 7
    heads: int = 6
    kv_rank: int = 96
    nope: int = 32
    rope: int = 16
    value: int = 48
    inner: int = 384
    experts: int = 4
    top: int = 2
    expert_inner: int = 80
    first_dense: int = 1
    scale: float = 1.0
    theta: float = 10000.0


class Norm(nn.Module):
    """Root mean square norm in float32, as the format has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, NORM_EPS)


class Attention(nn.Module):
    """Multi-head latent attention with interleaved rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.nope + shape.rope
        self.q_proj = nn.Linear(shape.hidden, shape.heads * width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(shape.hidden, shape.kv_rank + shape.rope, bias=False)
        self.kv_a_layernorm = Norm(shape.kv_rank)
        self.kv_b_proj = nn.Linear(shape.kv_rank, shape.heads * (shape.nope + shape.value), bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.value, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape, (batch, length, _) = self.shape, x.shape
        q = self.q_proj(x).view(batch, length, shape.heads, -1).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([shape.kv_rank, shape.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, shape.heads, -1).transpose(1, 2)
        k, v = kv.split([shape.nope, shape.value], dim=-1)
        q = torch.cat([q[..., : shape.nope], turned(q[..., shape.nope :], cos, sin)], dim=-1)
        k_rope = turned(k_rope.unsqueeze(1), cos, sin).expand(-1, shape.heads, -1, -1)
        k = torch.cat([k, k_rope], dim=-1)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (0, 1), (2, 3), ... turned by their angle; first all first halves, then all second halves."""
    one, two = x[..., 0::2], x[..., 1::2]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


class Dense(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Routed experts chosen by sigmoid scores plus a bias that evens their load, and one shared expert."""

    bias: Tensor
    load: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide = shape.experts * shape.expert_inner
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.gate = nn.Linear(shape.hidden, wide, bias=False)
        self.up = nn.Linear(shape.hidden, wide, bias=False)
        self.down = nn.Linear(wide, shape.hidden, bias=False)
        self.shared = Dense(shape.hidden, shape.expert_inner)
        self.register_buffer("bias", torch.zeros(shape.experts))
        self.register_buffer("load", torch.zeros(shape.experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self._weights(x)
        inner = F.silu(self.gate(x)) * self.up(x)
        spread = weights.to(inner.dtype).repeat_interleave(self.shape.expert_inner, dim=-1)
        return self.down(inner * spread) + self.shared(x)  # type: ignore[no-any-return]

    def _weights(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.router.weight).sigmoid()
        chosen = torch.topk(scores.detach() + self.bias, self.shape.top, dim=-1).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        if self.training:
            self.load += mask.detach().sum(dim=(0, 1))
        kept = scores * mask
        return kept / (kept.sum(dim=-1, keepdim=True) + 1e-20) * self.shape.scale

    def even_out(self, rate: float = 1e-3) -> None:
        """After a step: experts with less than their share become likelier to be chosen."""
        self.bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Layer(nn.Module):
    """Attention, then a dense or an expert layer, each behind its norm."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden)
        self.mlp: Dense | Experts = Dense(shape.hidden, shape.inner) if index < shape.first_dense else Experts(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Nano(nn.Module):
    """The whole model: ids to logits. The embedding is also the output matrix."""

    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.layers))
        self.norm = Norm(shape.hidden)
        steps = torch.arange(0, shape.rope, 2, dtype=torch.float32) / shape.rope
        self.register_buffer("frequencies", shape.theta**-steps, persistent=False)
        self.apply(_initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down.weight")):
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.features(ids), self.embed_tokens.weight)

    def features(self, ids: Tensor) -> Tensor:
        """What the output matrix is multiplied with."""
        angles = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device)[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def experts(self) -> list[Experts]:
        return [module for module in self.modules() if isinstance(module, Experts)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)


# ---- the folder ---------------------------------------------------------------------------------------------------
def config_of(shape: Shape) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "moe_intermediate_size": shape.expert_inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "n_shared_experts": 1,
        "n_routed_experts": shape.experts,
        "num_experts_per_tok": shape.top,
        "routed_scaling_factor": shape.scale,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": shape.first_dense,
        "kv_lora_rank": shape.kv_rank,
        "q_lora_rank": None,
        "qk_rope_head_dim": shape.rope,
        "qk_nope_head_dim": shape.nope,
        "v_head_dim": shape.value,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": shape.theta,
        "rope_scaling": None,
        "rope_interleave": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",  # to compute in, so that it says the same on every machine
    }


def folder_weights(model: Nano) -> dict[str, Tensor]:
    """The model's weights under the names of the format."""
    shape, found = (
        model.shape,
        {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm.weight},
    )
    for index, layer in enumerate(model.layers):
        at = f"model.layers.{index}."
        for name, weight in layer.state_dict().items():
            if not (name.startswith("mlp.") and isinstance(layer.mlp, Experts)):
                found[at + name] = weight
        if isinstance(layer.mlp, Experts):
            found |= {at + "mlp." + name: weight for name, weight in _expert_weights(layer.mlp, shape).items()}
    return {name: weight.detach().to(_stored(name)).contiguous().clone() for name, weight in found.items()}


def _stored(name: str) -> torch.dtype:
    """Half the bytes for what is large. Norms and routing stay whole: they are few, and routing is a choice."""
    return torch.float32 if "norm" in name or ".mlp.gate." in name else torch.bfloat16


def _expert_weights(mlp: Experts, shape: Shape) -> dict[str, Tensor]:
    found = {"gate.weight": mlp.router.weight, "gate.e_score_correction_bias": mlp.bias}
    found |= {f"shared_experts.{name}": weight for name, weight in mlp.shared.state_dict().items()}
    for expert in range(shape.experts):
        rows = slice(expert * shape.expert_inner, (expert + 1) * shape.expert_inner)
        found[f"experts.{expert}.gate_proj.weight"] = mlp.gate.weight[rows]
        found[f"experts.{expert}.up_proj.weight"] = mlp.up.weight[rows]
        found[f"experts.{expert}.down_proj.weight"] = mlp.down.weight[:, rows]
    return found


def write_model(model: Nano, out: Path) -> None:
    """config.json, generation_config.json and model.safetensors, matrices in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (out / "config.json").write_text(json.dumps(config_of(model.shape), indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
    save_file(folder_weights(model), str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the writer keeps it to its owner; a package is for everyone


def averaged(one: Nano, two: Nano, share: float) -> Nano:
    """The mean of two models of the same run, `share` of it the second: better than either, as they err differently."""
    if one.shape != two.shape:
        raise ValueError(f"models of different shapes have no mean: {one.shape} and {two.shape}.")
    model, other = Nano(one.shape), two.state_dict()
    model.load_state_dict({name: weight.lerp(other[name], share) for name, weight in one.state_dict().items()})
    return model.eval()


def read_model(folder: Path) -> Nano:
    """The model of a folder that `write_model` wrote."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(**{name: raw[key] for name, key in _KEYS.items()})
    if set(asdict(shape)) != set(_KEYS):
        raise ValueError("a number of Shape is missing in config.json")
    weights = load_file(str(folder / "model.safetensors"))
    model = Nano(shape)
    state = {}
    for name in model.state_dict():
        state[name] = _read_weight(weights, f"model.{name}", shape).float()
    model.load_state_dict(state)
    return model.eval()


_KEYS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_rank": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
    "inner": "intermediate_size",
    "experts": "n_routed_experts",
    "top": "num_experts_per_tok",
    "expert_inner": "moe_intermediate_size",
    "first_dense": "first_k_dense_replace",
    "scale": "routed_scaling_factor",
    "theta": "rope_theta",
}
_RENAMED = {"router.weight": "gate.weight", "bias": "gate.e_score_correction_bias"}


def _read_weight(weights: dict[str, Tensor], name: str, shape: Shape) -> Tensor:
    if name in weights and not name.endswith(".mlp.gate.weight"):
        return weights[name]
    at, last = name.split(".mlp.")
    if last in _RENAMED:
        return weights[f"{at}.mlp.{_RENAMED[last]}"]
    if last.startswith("shared."):
        return weights[f"{at}.mlp.shared_experts.{last.removeprefix('shared.')}"]
    kind = last.removesuffix(".weight")
    each = [weights[f"{at}.mlp.experts.{expert}.{kind}_proj.weight"] for expert in range(shape.experts)]
    return torch.cat(each, dim=1 if kind == "down" else 0)
