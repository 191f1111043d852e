"""Batch-invariant steps of a GPU's kernels, through the interpreter: bits of rows alone, in graphs and in any steps.

The interpreter shows that plans, masks, padding and the order of sums do not depend on a step. That a chip's matrix
instructions add alike in all blocks is shown on a chip (tests/integration/test_cuda_invariance.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
from triton.runtime import interpreter

import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.graphs import Graphs
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.models.weights import RandomWeights
from agentspeed_engine.spmd.lower import run
from agentspeed_engine.spmd.placement import ONE
from agentspeed_kernels.platform import named
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.triton import backend
from agentspeed_kernels.triton import plan as plan_module
from agentspeed_kernels.triton.backend import attention_of
from agentspeed_kernels.workspace import Workspace
from tests.support.paged import CONFIG, Trail, batch
from tests.support.recorder import CallsAgain

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")

PAGE, PAGES = 16, 160
CPU = torch.device("cpu")
SIZES = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "hidden_size": 64,
         "num_hidden_layers": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip
IDS = np.random.default_rng(5).integers(3, 40, 400).tolist()


class OnTriton:
    """A model of random weights whose steps run on the kernels of a GPU, as the interpreter has them."""

    def __init__(self, folder: Path, model: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps(model))
        source = read_source(f"random:{folder / 'config.json'}")
        family, config = source.family, source.config
        sizes = {"page_tokens": PAGE, **family.sizes(config, ONE.mesh)}
        ops = family.ops_on("cuda", joins=False, invariant=True)
        kernels = Kernels(standard(), named("cuda:90"), "float32", ops, sizes=sizes, invariant=True)
        self._pools = KvPools(family.kv_layout(config, "float32", ONE.mesh), PAGES, PAGE)
        weights = RandomWeights(dict(family.shapes(config)), torch.float32)
        self._steps: list[Any] = [
            lambda x, residual, state, _, module=module: module(x, residual, state)
            for module in family.build(config, weights, self._pools, ONE, kernels)
        ]
        self._rope = Rope(config.rope, config.context_limit, torch.float32)
        self._attention = attention_of(sizes, CPU, 4, invariant=True)
        self.shape = self._attention.shape
        self._graphs = Graphs(None, self._steps, self.forward, self._pools, config.vocab_size, self._rope,
                              self._attention, CPU, recorder=CallsAgain())  # fmt: skip

    @torch.inference_mode()
    def forward(self, given: FlatBatch) -> Tensor:
        ids, state = step_state(given, self._rope, PAGE, Workspace(), self._attention)
        logits: Tensor = run(self._steps, ids, state, (len(given.ids),))
        return logits.clone()

    @torch.inference_mode()
    def from_a_graph(self, given: FlatBatch) -> Tensor:
        """Of a step that is met as often as it takes."""
        return next(found for _ in range(5) if (found := self._graphs.run(given, None)) is not None).clone()


def in_order(self: Any, a: Any, b: Any, held: Any, *_: Any) -> Any:
    """A product as matrix instructions add it: along the inputs, to what the block holds. The interpreter's own is
    BLAS, which has another order for every shape."""
    del self
    terms = a.data.T[:, :, None] * b.data[:, None, :]
    sums = np.add.accumulate(np.concatenate([held.data[None], terms]))[-1]
    return interpreter.TensorHandle(sums, held.dtype.scalar)


@pytest.fixture(params=["latent", "grouped"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnTriton:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_order)
    monkeypatch.setattr(plan_module, "FIXED_STEPS", ((32, 16), (None, 32)))
    return OnTriton(tmp_path, CONFIG | SIZES if request.param == "latent" else GROUPED)


def test_rows_of_chunks_forks_batches_and_graphs_have_the_bits_of_rows_alone(model: OnTriton) -> None:
    """A fork whose prompt is cut once, among others, against a branch that has every token in a step of its own."""
    prefix = Trail(PAGE, list(range(3)))
    model.forward(batch(PAGE, [(prefix, IDS[:32])], select="none"))
    prompt, cut = IDS[60:64], 2
    alone = Trail(PAGE, list(range(100, 110)))
    model.forward(batch(PAGE, [(alone, IDS[:17])], select="none"))
    model.forward(batch(PAGE, [(alone, IDS[17:32])], select="none"))
    wanted = torch.cat([model.forward(batch(PAGE, [(alone, [one])])) for one in prompt])
    forks = [Trail(PAGE, [0, 1, *range(10 + 10 * i, 20 + 10 * i)], shared=32, known=32) for i in range(3)]
    # More rows than the smaller blocks of the kernels have.
    first = [(forks[0], IDS[100:115]), (forks[1], prompt[:cut]), (forks[2], IDS[200:203])]
    assert torch.equal(model.forward(batch(PAGE, first))[15 : 15 + cut], wanted[:cut])
    then = batch(PAGE, [(forks[0], [7]), (forks[1], prompt[cut:]), (forks[2], [8])])
    assert torch.equal(model.from_a_graph(then)[1 : 1 + len(prompt) - cut], wanted[cut:])


@pytest.mark.parametrize("model", ["latent"], indirect=True)
def test_rows_whose_partials_have_no_room_together_run_one_after_the_other(
    model: OnTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = IDS[:19]
    together = model.forward(batch(PAGE, [(Trail(PAGE, [0, 1]), prompt), (Trail(PAGE, [2]), IDS[40:43])]))
    monkeypatch.setattr(backend, "PARTIAL_BYTES", 9000)
    step = batch(PAGE, [(Trail(PAGE, [3, 4]), prompt), (Trail(PAGE, [5]), IDS[40:43])])
    assert len(backend.split_rows(step.runs, model.shape, 9000)) > 1
    assert torch.equal(model.forward(step), together)
