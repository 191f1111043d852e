"""bf16 logits of whole models, for every form of the kernels that this machine runs.

Ops that are right one by one can still be put together wrongly: a weight packed for one op and read by another gives
plausible numbers. Only logits against the float64 model show that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_kernels.cpu import native
from tests.support.decoded_logits import apart
from tests.support.needs import missing
from tests.support.paged import CONFIG, Trail, batch
from tests.support.random_checkpoint import make_checkpoint
from tests.support.weights_held import bytes_held

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 64
# Widths that tiles read where they lie, and (CONFIG itself) widths that need padding.
WHOLE = CONFIG | {
    "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "kv_lora_rank": 64, "q_lora_rank": 96,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
GROUPED = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rope_theta": 5000.0, "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
CONFIGS = {
    "grouped": GROUPED,
    "grouped, odd": GROUPED | {"head_dim": 24, "hidden_size": 72, "tie_word_embeddings": True},
    "whole": WHOLE,
    "odd": CONFIG,
    "tied": WHOLE | {"tie_word_embeddings": True},
    "bias": WHOLE | {"attention_bias": True},
    "one head": WHOLE | {"num_attention_heads": 1, "num_key_value_heads": 1},
}
IDS = np.random.default_rng(11).integers(0, 300, 400).tolist()


Parts = dict[str, torch.Tensor]


@contextmanager
def only(switch: str) -> Iterator[None]:
    """The kernels of the named form and those below it; "0" is torch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.SWITCH, switch)
        native.library.cache_clear()
        yield
    native.library.cache_clear()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parts, Parts]:
    """A checkpoint, its logits in float64, and torch's in bf16."""
    folder = make_checkpoint(CONFIGS[request.param], tmp_path_factory.mktemp("model"), seed=8, dtype="bfloat16")
    with only("0"):
        return folder, logits(folder, "float64"), logits(folder, "bfloat16")


def logits(folder: Path, dtype: str) -> Parts:
    """Of a long prompt, of its chunks, of single tokens, and of branches below one prefix."""
    model: LoadedModel = load(folder, dtype=dtype, pages=80, page_tokens=PAGE)  # type: ignore[arg-type]
    order = np.random.default_rng(3).permutation(80).tolist()
    whole = model.forward(batch(PAGE, [(Trail(PAGE, order[:12]), IDS[:260])]))
    cut, parts = Trail(PAGE, order[12:22]), []
    for low, high in ((0, 37), (37, 90), (90, 260), (260, 261), (261, 263)):
        parts.append(model.forward(batch(PAGE, [(cut, IDS[low:high])])))
    shared = order[22:25]
    model.forward(batch(PAGE, [(Trail(PAGE, shared), IDS[: 3 * PAGE])]))
    branches = [Trail(PAGE, [*shared, order[30 + i]], shared=3 * PAGE, known=3 * PAGE) for i in range(10)]
    forks = [
        model.forward(batch(PAGE, [(branch, [IDS[i + at]]) for i, branch in enumerate(branches)])) for at in range(1)
    ]
    return {"prompt": whole, "chunks": torch.cat(parts), "forks": torch.cat(forks)}


@pytest.mark.parametrize("form", [form.name for form in native.forms_here()])
def test_logits_are_as_near_to_the_definition_as_those_of_torch(form: str, model: tuple[Path, Parts, Parts]) -> None:
    folder, wanted, torch_alone = model
    with only(form):
        library = native.library()
        if isinstance(library, native.Unavailable):
            missing(f"the native kernels cannot be built here: {library.reason}")
        if form not in {form.name for form in library.forms}:
            pytest.skip(f"this machine does not run the {form} kernels")
        got = logits(folder, "bfloat16")
    for part, exact in wanted.items():
        ours, theirs = apart(got[part], exact), apart(torch_alone[part], exact)
        assert ours <= 1.1 * theirs, f"{part}: {ours:.4f} against torch's {theirs:.4f}"
        assert ours < 0.05


@pytest.mark.parametrize("form", [form.name for form in native.forms_here()])
def test_the_number_of_threads_changes_no_bit(form: str, tmp_path: Path) -> None:
    """Large enough that a team is worth it; three threads share nothing evenly."""
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5}
    config = WHOLE | heads | {"hidden_size": 512, "intermediate_size": 528, "num_hidden_layers": 2}
    folder = make_checkpoint(config, tmp_path, seed=8, dtype="bfloat16")
    results: list[Parts] = []
    with only(form):
        if form not in {form.name for form in getattr(native.library(), "forms", ())}:
            pytest.skip(f"this machine does not run the {form} kernels")
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(decoded(folder))
            torch.set_num_threads(1)
    for part, alone in results[0].items():
        assert torch.equal(alone, results[1][part]), part


def decoded(folder: Path) -> Parts:
    """What native kernels alone compute in every form: up to 8 rows."""
    model: LoadedModel = load(folder, dtype="bfloat16", pages=12, page_tokens=PAGE)
    prompt = Trail(PAGE, list(range(4)))
    for low in range(0, 3 * PAGE, 8):
        model.forward(batch(PAGE, [(prompt, IDS[low : low + 8])]))
    branches = [Trail(PAGE, [0, 1, 2, 5 + i], shared=3 * PAGE, known=3 * PAGE) for i in range(5)]
    return {
        "alone": model.forward(batch(PAGE, [(prompt, IDS[:1])])),
        "forks": model.forward(batch(PAGE, [(branch, [IDS[i]]) for i, branch in enumerate(branches)])),
    }


def test_a_weight_is_kept_once(tmp_path: Path) -> None:
    """Packing replaces the original: what a model holds is no more than its checkpoint and the padding of tiles."""
    folder = make_checkpoint(WHOLE | {"tie_word_embeddings": True}, tmp_path, seed=8, dtype="bfloat16")
    model = load(folder, dtype="bfloat16", pages=2, page_tokens=PAGE)
    # The router alone is kept wider than the checkpoint has it.
    assert model.info.weight_bytes < bytes_held(model) < 1.1 * model.info.weight_bytes
