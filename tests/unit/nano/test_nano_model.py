"""The network of the shipped model: its folder is exactly the public format, and its training can stop and go on."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

HOME = Path(__file__).resolve().parents[3]
from tokenizers import Tokenizer  # noqa: E402

from bench import nano as nano_bench  # noqa: E402
from tests.support.needs import needed  # noqa: E402
from tools.nano import scoring as nano_scoring  # noqa: E402
from tools.nano import tasks as nano_tasks  # noqa: E402
from tools.nano import train as train_nano  # noqa: E402
from tools.nano.data import Rounds  # noqa: E402
from tools.nano.grow import grown  # noqa: E402
from tools.nano.model import Nano, Shape, averaged, read_model, write_model  # noqa: E402
from tools.nano.optim import Muon, orthogonal  # noqa: E402
from tools.nano.peers import Peers  # noqa: E402
from tools.nano.start import start_with_copying  # noqa: E402

FOLDER = HOME / "agentspeed" / "models" / "nano"
TINY = Shape(hidden=32, layers=2, heads=2, kv_rank=16, nope=8, rope=4, value=12, inner=32, expert_inner=16)


def test_the_folder_gives_the_same_logits_in_transformers() -> None:
    transformers = needed("transformers", "transformers is the reference")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = torch.randint(0, 1024, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - read_model(FOLDER)(ids)).abs().max() < 1e-4


def test_the_shipped_model_has_the_size_it_claims() -> None:
    count = sum(weight.numel() for weight in read_model(FOLDER).parameters())
    assert 3_500_000 <= count <= 4_500_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000


def test_writing_and_reading_a_folder_gives_the_model_back(tmp_path: Path) -> None:
    model = Nano(TINY)
    for experts in model.experts():
        experts.bias += torch.rand(TINY.experts)
    write_model(model, tmp_path)
    again = read_model(tmp_path)
    assert again.shape == TINY
    for name, weight in model.state_dict().items():
        assert torch.equal(stored(name, weight), again.state_dict()[name]), name


def stored(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight as a folder has it: matrices in bfloat16, norms and what routes in full."""
    whole = "norm" in name or name.endswith(("router.weight", ".bias"))
    return weight if whole else weight.bfloat16().float()


def test_a_model_that_has_grown_says_what_it_said_before_and_can_learn_with_all_that_is_new() -> None:
    torch.manual_seed(3)
    small = Nano(TINY)
    for weight in small.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    large = grown(small, replace(TINY, hidden=48, layers=3, inner=40, expert_inner=24))
    ids = torch.randint(11, 1024, (2, 30))
    assert torch.allclose(small(ids), large(ids), atol=1e-3)
    large(ids).logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
    new = large.layers[0].self_attn.o_proj.weight.grad  # type: ignore[union-attr]
    assert isinstance(new, torch.Tensor) and new[TINY.hidden :].abs().max() > 0
    with pytest.raises(ValueError, match="cannot grow into another heads, hidden"):
        grown(small, replace(TINY, hidden=16, heads=1))


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


def tiny_plan(folder: Path) -> train_nano.Plan:
    """A run of a model of two small layers, in this folder."""
    return train_nano.Plan(minutes=1.0, out=folder / "out", checkpoints=folder / "state", shape=TINY)


@pytest.fixture
def small_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_nano, "TOKENIZER_ROWS", 1500)


@pytest.mark.usefixtures("small_tokenizer")
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"start": FOLDER}, r"start is .*models/nano, and was None; shape is .*, and was .*'hidden': 32"),
        ({"minutes": 2.0}, r"minutes is 2\.0, and was 1\.0"),
        ({"shape": replace(TINY, layers=3)}, r"shape is .*'layers': 3.*, and was .*'layers': 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name_with_the_way_out(
    tmp_path: Path, other: dict[str, Any], named: str
) -> None:
    plan = tiny_plan(tmp_path)
    train_nano.Training(plan).save()
    with pytest.raises(train_nano.OtherRun, match=rf"state\.pt is of another run: {named}.*--checkpoints.*remove"):
        train_nano.Training(replace(plan, **other))
    assert train_nano.Training(replace(plan, out=tmp_path / "elsewhere", rate=0.5)).step == 0


@pytest.mark.usefixtures("small_tokenizer")
def test_a_checkpoint_that_does_not_say_what_it_was_started_with_is_refused(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path)
    train_nano.Training(plan).save()
    file = plan.checkpoints / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["started"]
    torch.save(state, file)
    with pytest.raises(train_nano.OtherRun, match=r"minutes is 1\.0, and was not noted"):
        train_nano.Training(plan)


@pytest.mark.usefixtures("small_tokenizer")
def test_each_process_goes_on_with_rounds_of_its_own(tmp_path: Path) -> None:
    plan, second = tiny_plan(tmp_path), Peers()
    leader = train_nano.Training(plan)
    leader.round = 7
    leader.save()
    second.rank = 1
    assert train_nano.Training(plan).round == 7
    assert train_nano.Training(plan, second).round == (1 << 32) + 7


@pytest.mark.usefixtures("small_tokenizer")
def test_a_checkpoint_can_be_written_as_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train_nano.Training(tiny_plan(tmp_path))
    training.save()
    out = tmp_path / "exported"
    command = ["train_nano.py", "--checkpoints", str(tmp_path / "state"), "--export", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    train_nano.main()
    for name, weight in training.model.state_dict().items():
        assert torch.equal(stored(name, weight), read_model(out).state_dict()[name]), name
    assert Tokenizer.from_file(str(out / "tokenizer.json")).to_str() == training.tokenizer.to_str()
    assert (out / "tokenizer_config.json").is_file()
    monkeypatch.setattr(sys, "argv", [*command[:2], str(tmp_path / "none"), *command[3:]])
    with pytest.raises(SystemExit):
        train_nano.main()


@pytest.mark.usefixtures("small_tokenizer")
def test_the_command_refuses_a_checkpoint_of_another_run_before_it_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_nano.Training(tiny_plan(tmp_path)).save()
    command = ["train_nano.py", "--minutes", "1", "--checkpoints", str(tmp_path / "state"), "--start", str(FOLDER)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(train_nano, "learn", lambda *_: pytest.fail("it learns"))
    monkeypatch.setattr(train_nano, "spawn", lambda *_, **__: pytest.fail("it learns"))
    with pytest.raises(SystemExit) as ended:
        train_nano.main()
    assert ended.value.code == 2
    assert "is of another run: start is" in capsys.readouterr().err


def test_the_mean_of_two_folders_is_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_nano.py", "--average", str(FOLDER), str(FOLDER), "--out", str(tmp_path)])
    train_nano.main()
    assert {file.name for file in tmp_path.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}


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


def test_a_command_of_limited_seconds_stops_by_its_deadline_and_has_cooled_down_by_then(tmp_path: Path) -> None:
    training = train_nano.Training.__new__(train_nano.Training)
    now = time.monotonic()
    training.plan = train_nano.Plan(minutes=1.0, out=tmp_path, checkpoints=tmp_path, deadline=now - 1, whole=True)
    training.seconds, training.step = 20.0, 5000
    assert (training.progress, training.rate()) == (1.0, 0.01)
    training.plan = replace(training.plan, deadline=now + 3600)
    assert training.progress == pytest.approx(1 / 3)
    training.plan = replace(training.plan, deadline=now - 1, whole=False)
    assert training.progress == pytest.approx(1 / 3)  # a piece of a longer run: the next one goes on from here
    assert training.over


def test_the_tasks_that_are_reported_never_chose_any_weights() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    chosen_by = nano_tasks.held_out("puzzle", 20, nano_scoring.SELECTING)
    assert nano_scoring.HeldOut(tokenizer, 20).puzzles["puzzle"] == chosen_by
    assert nano_scoring.SELECTING != nano_scoring.UNSEEN
    assert nano_bench.UNSEEN == nano_scoring.UNSEEN


def test_held_out_tasks_come_from_another_generator_than_training() -> None:
    assert nano_tasks.held_out("tool", 3) == nano_tasks.held_out("tool", 3)
    with pytest.raises(ValueError, match="no held-out set 'poem'"):
        nano_tasks.held_out("poem", 1)
