"""How far a kernel may be from the float64 definition, per format and kind of op, each with its reason.

The measure is max|d| / max|definition| over a call: an error relative to the largest value, since sums of n terms carry
errors of that size whatever the size of a single result.
"""

from __future__ import annotations

from typing import Literal

from agentspeed_kernels.signature import Dtype

Kind = Literal["elementwise", "product", "routing", "attention", "experts", "move"]

KIND_OF: dict[str, Kind] = {
    "linear": "product",
    "heads_linear": "product",
    "rms_norm": "elementwise",
    "add_rms_norm": "elementwise",
    "rope": "elementwise",
    "latent_append": "elementwise",
    "route": "routing",
    "mla_rows": "attention",
    "mla_extend": "attention",
    "experts": "experts",
    "qkv_append": "elementwise",
    "gqa_rows": "attention",
    "gqa_extend": "attention",
    "index_append": "elementwise",
    "index_select": "routing",
    "mla_selected": "attention",
    "add_norm_linear": "product",
    "mla_queries": "product",
    "add_norm_route": "routing",
    "experts_and_shared": "experts",
    "copy_rows": "move",
    "gather_pages": "move",
    "scatter_pages": "move",
}

TOLERANCE: dict[tuple[Kind, Dtype], tuple[float, str]] = {
    ("move", "float64"): (0.0, "bits are copied"),
    ("move", "float32"): (0.0, "bits are copied"),
    ("move", "bfloat16"): (0.0, "bits are copied"),
    ("elementwise", "float64"): (1e-14, "a few roundings of 1e-16 each"),
    ("product", "float64"): (1e-13, "sums of up to 1000 terms in any order"),
    ("routing", "float64"): (
        1e-12,
        "as product; sigmoid and softmax turn a logit's absolute error into a relative one",
    ),
    ("attention", "float64"): (
        2e-12,
        "two products, and exp amplifies score errors by the scores' size; what 8 bits stand for is rounded as well",
    ),
    ("experts", "float64"): (1e-12, "two products in a row and a sum over experts"),
    ("elementwise", "float32"): (2e-6, "a few roundings of 6e-8 and a sum of squares"),
    ("product", "float32"): (5e-6, "sums of up to 1000 terms in any order, 6e-8 each"),
    ("routing", "float32"): (5e-5, "as product; sigmoid and softmax turn a logit's absolute error into a relative one"),
    ("attention", "float32"): (
        6e-4,
        "exp turns the absolute error of a score, 6e-8 × some thousands, twice from 8 bits, into a relative one",
    ),
    ("experts", "float32"): (2e-5, "two products in a row; SiLU's exp is a polynomial in C"),
    ("elementwise", "bfloat16"): (2e-2, "results are rounded to 8 bits (4e-3), after inputs of 8 bits are combined"),
    ("product", "bfloat16"): (2e-2, "inputs are exact, sums are float32, the result is rounded to 8 bits"),
    ("routing", "bfloat16"): (5e-5, "inputs are exact and scores are float32"),
    ("attention", "bfloat16"): (
        1e-1,
        "decompressed keys, scores and shares are each rounded to 8 bits, 4e-3, before exp or the next product",
    ),
    ("experts", "bfloat16"): (4e-2, "the inner activation is rounded to 8 bits between two products"),
}

UNDEFINED: dict[tuple[Kind, Dtype, str], str] = {
    ("attention", "bfloat16", "large"): "scores of thousands rounded to 8 bits have no order among near-ties",
}
"""Where a format itself has no answer to keep to: (kind, format, manner of the inputs), with the reason."""


def tolerance(op: str, dtype: Dtype) -> float:
    return TOLERANCE[(KIND_OF[op], dtype)][0]
