"""Two ranks that launch steps and draw by themselves draw what one draws: with the kernels of GPUs, interpreted."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import tests.triton_interpreter  # noqa: F401 - must come before the first kernel
from agentspeed_engine.exec import cuda
from agentspeed_engine.exec.cuda import CudaExecutor
from agentspeed_engine.exec.executor import Token
from agentspeed_engine.exec.ranks import launches
from agentspeed_engine.exec.ranks.device_leader import DeviceLeader
from agentspeed_engine.exec.ranks.group import TorchGroup
from agentspeed_engine.exec.ranks.sides import Followers
from agentspeed_engine.exec.step_input import Sample, StepInput, Unknown
from agentspeed_engine.exec.torch_model import TorchModel
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.models import graphs
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_engine.spmd.placement import Mesh
from tests.conformance.test_triton_joined import MODELS
from tests.support.launching_ranks import CPU, DEPTH, PAGE, model_of, without_cuda
from tests.support.paged import Trail, batch
from tests.support.thread_ranks import NoLosses

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
RULES = (Sampling(logprobs=2), Sampling(temperature=0.9, top_p=0.9), Sampling(temperature=1.2, logit_bias=((7, 3.0),)))


@pytest.fixture
def nothing_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((torch, "empty"), (cuda, "_cuda"), (launches, "_cuda"), (graphs, "BUCKETS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    without_cuda()


def drawn(executor: CudaExecutor) -> list[list[Token]]:
    """Three branches: prompts, and then tokens of which each step names those of the one before."""
    given: dict[str, Any] = {"stop_strings": (), "grammar": None, "consumed_ids": (), "prompt_tokens": 1}
    turns = [
        TurnSpec(turn=number, branch=BranchId(number), sampling=rule, draw_key=(3, number, 0), **given)
        for number, rule in enumerate(RULES)
    ]
    trails = [Trail(PAGE, [2 * row, 2 * row + 1]) for row in range(3)]
    found, flying = [], []
    for step in range(6):
        new = [[11 + row, 5, 9][: 1 + row] if step == 0 else [0] for row in range(3)]
        fed = batch(PAGE, list(zip(trails, new, strict=True)), "last")
        every = np.arange(3 if step else 0, dtype=np.int64)
        told = StepInput(
            step=step,
            batch=fed,
            unknown=Unknown(at=every, step=np.full(every.size, step - 1), place=every),
            samples=tuple(Sample(turn, trail.known) for turn, trail in zip(turns, trails, strict=True)),
        )
        flying.append(executor.launch(told))
        if len(flying) > DEPTH:
            found.append(executor.collect(flying.pop(0)))
    found += [executor.collect(one) for one in flying]
    assert all(isinstance(token, Token) for tokens in found for token in tokens)
    return [[token for token in tokens if isinstance(token, Token)] for tokens in found]


def on_two(config: Path, folder: Path, vocabulary: Vocabulary) -> list[list[Token]]:
    (ours, theirs), (our_copies, their_copies) = socket.socketpair(), socket.socketpair()
    command = [sys.executable, "-m", "tests.support.launching_ranks", str(folder), str(config)]
    fds = (theirs.fileno(), their_copies.fileno())
    paths = os.pathsep.join(path for path in sys.path if path)
    other = subprocess.Popen([*command, *map(str, fds)], pass_fds=fds, env=os.environ | {"PYTHONPATH": paths})
    theirs.close()
    their_copies.close()
    try:
        with closing(TorchGroup(folder, Mesh(tp=2).rank(0), seconds=60, device=CPU)) as group:
            model: TorchModel = model_of(config, Mesh(tp=2).rank(0), folder, group)
            with closing(Followers([ours], [our_copies], seconds=60.0)) as followers:
                leader = DeviceLeader(followers, group, NoLosses(), seconds=60.0)
                return drawn(CudaExecutor(model, vocabulary, depth=DEPTH, others=leader))
    finally:
        other.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["latent, softmax"])
def test_ranks_that_launch_by_themselves_draw_what_one_rank_draws(
    nothing_of_cuda: None, model: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MODELS[model] | {"num_hidden_layers": 2}))
    vocabulary = Vocabulary(tmp_path, 300, ())
    alone = drawn(CudaExecutor(model_of(config, Mesh().rank(0), tmp_path, None), vocabulary, depth=DEPTH))
    both = on_two(config, tmp_path, vocabulary)
    assert [[one.id for one in tokens] for tokens in both] == [[one.id for one in tokens] for tokens in alone]
    for mine, theirs in zip(both, alone, strict=True):
        assert mine[0].logprob == pytest.approx(theirs[0].logprob, abs=1e-4)
