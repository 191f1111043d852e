"""The network of the shipped model: its folder is exactly the public format, and its training can stop and go on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME / "tools"))

import nano_tasks  # noqa: E402
import train_nano  # noqa: E402
from nano_data import Rounds  # noqa: E402
from nano_model import Nano, Shape, averaged, read_model, write_model  # noqa: E402
from nano_optim import Muon, orthogonal  # noqa: E402
from nano_peers import Peers  # noqa: E402
from nano_start import start_with_copying  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

FOLDER = HOME / "agentspeed" / "models" / "nano"
TINY = Shape(hidden=32, layers=2, heads=2, kv_rank=16, nope=8, rope=4, value=12, inner=32, expert_inner=16)


def test_the_folder_gives_the_same_logits_in_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference; install agentspeed[test]")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = torch.randint(0, 1024, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - read_model(FOLDER)(ids)).abs().max() < 1e-4


def test_the_shipped_model_has_the_size_it_claims() -> None:
    count = sum(weight.numel() for weight in read_model(FOLDER).parameters())
    assert 1_600_000 <= count <= 3_000_000


def test_writing_and_reading_a_folder_gives_the_model_back(tmp_path: Path) -> None:
    model = Nano(TINY)
    for experts in model.experts():
        experts.bias += torch.rand(TINY.experts)
    write_model(model, tmp_path)
    again = read_model(tmp_path)
    assert again.shape == TINY
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_the_mean_of_two_models_lies_between_them_and_two_shapes_have_none() -> None:
    one, two = Nano(TINY), Nano(TINY)
    mean = averaged(one, two, 0.25)
    for name, weight in mean.state_dict().items():
        assert torch.allclose(weight, 0.75 * one.state_dict()[name] + 0.25 * two.state_dict()[name], atol=1e-6)
    with pytest.raises(ValueError, match="different shapes"):
        averaged(one, Nano(replace(TINY, layers=3)), 0.5)


def test_evening_out_makes_idle_experts_likelier() -> None:
    experts = Nano(TINY).experts()[0]
    experts.load += torch.tensor([9.0, 1.0, 1.0, 1.0])
    experts.even_out(rate=0.5)
    assert experts.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert experts.load.sum() == 0


def test_muon_steps_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(24, 40, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.4
    assert values.max() < 1.6


def test_muon_moves_a_weight_the_same_alone_and_among_others_of_its_shape() -> None:
    generator = torch.Generator().manual_seed(2)
    start, gradient = (torch.randn(2, 6, 10, generator=generator) for _ in range(2))

    def moved(*chosen: int) -> torch.Tensor:
        weights = [torch.nn.Parameter(start[index].clone()) for index in chosen]
        optimiser = Muon(weights)
        for _ in range(2):
            for index, weight in zip(chosen, weights, strict=True):
                weight.grad = gradient[index].clone()
            optimiser.step()
        return weights[-1].detach()

    assert torch.allclose(moved(1), moved(0, 1), atol=1e-6)
    assert not torch.allclose(moved(1), start[1], atol=1e-3)


def test_data_made_ahead_by_workers_is_the_data_made_here() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    here, ahead = (Rounds(tokenizer, first=7, rows=6, budget=512, workers=workers) for workers in (0, 1))
    try:
        for (ids, made), (other_ids, other_made) in zip(here.next(1.0), ahead.next(1.0), strict=True):
            assert torch.equal(ids, other_ids.long())
            assert torch.equal(made, other_made)
    finally:
        ahead.close()


def test_one_process_alone_averages_with_nobody() -> None:
    peers, weights = Peers(), torch.ones(3)
    peers.average([weights])
    assert (weights.tolist(), peers.agreed(2.5), peers.leads) == ([1.0, 1.0, 1.0], 2.5, True)
    with pytest.raises(ValueError, match="need a file to meet at"):
        Peers(0, 2)


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_nano, "TOKENIZER_ROWS", 1500)
    plan = train_nano.Plan(
        minutes=60.0,
        out=tmp_path / "out",
        checkpoints=tmp_path / "state",
        shape=TINY,
        held_out=2,
        rows=12,
        budget=512,
        most_steps=2,
    )
    first = train_nano.Training(plan)
    first.run()
    second = train_nano.Training(replace(plan, most_steps=3))
    assert (second.step, second.tokens) == (2, first.tokens)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])
    second.run()
    assert second.step == 3
    assert second.round > first.round
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_training_goes_on_from_a_finished_model_with_its_tokenizer(tmp_path: Path) -> None:
    shipped = read_model(FOLDER)
    plan = train_nano.Plan(minutes=1.0, out=tmp_path, checkpoints=tmp_path / "none", start=FOLDER)
    training = train_nano.Training(plan)
    assert (training.step, training.seconds) == (0, 0.0)
    for name, weight in shipped.state_dict().items():
        assert torch.equal(weight, training.model.state_dict()[name]), name
    assert training.tokenizer.to_str() == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).to_str()


def test_training_starts_with_a_model_that_copies() -> None:
    torch.manual_seed(0)
    model = Nano(Shape())
    start_with_copying(model)
    text = torch.randint(11, 1024, (4, 24), generator=torch.Generator().manual_seed(0))
    twice = torch.cat([text, text], dim=1)
    with torch.no_grad():
        likeliest = model(twice[:, :-1]).argmax(-1)
    assert (likeliest[:, 24:] == twice[:, 25:]).float().mean() > 0.5


def test_the_rate_rises_first_and_falls_at_the_end(tmp_path: Path) -> None:
    training = train_nano.Training.__new__(train_nano.Training)
    training.plan = train_nano.Plan(minutes=1.0, out=tmp_path, checkpoints=tmp_path)
    training.seconds, training.step = 0.0, 5
    warming = training.rate()
    training.seconds, training.step = 20.0, 5000
    assert warming < training.rate() == 1.0
    training.seconds = 59.9
    assert training.rate() == 0.01


def test_held_out_tasks_come_from_another_generator_than_training() -> None:
    assert nano_tasks.held_out("tool", 3) == nano_tasks.held_out("tool", 3)
    with pytest.raises(ValueError, match="no held-out set 'poem'"):
        nano_tasks.held_out("poem", 1)
