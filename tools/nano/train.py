"""Trains nano from tasks it generates and writes the model folder; can be stopped and resumed at any time.

    python tools/nano/train.py --minutes 120 --processes 2
    python tools/nano/train.py --seconds 580 --processes 1 --device cuda --workers 15 --budget 98304 --compile \\
        --grow agentspeed/models/nano --rate 0.8 --cooldown 0.5
    python tools/nano/train.py --minutes 60 --start agentspeed/models/nano --rate 0.05 --cooldown 0.85 --budget 8192
    python tools/nano/train.py --score agentspeed/models/nano
    python tools/nano/train.py --export FOLDER      (the state of the checkpoint, also while a run goes on)

Progress, checkpoints each minute and the best model by held-out score; what is scored and written is the mean of the
last states. The same command resumes where it stopped; one with another start, length or shape is refused while the
checkpoint is there. `--seconds`: this command ends within so long, with what it needs besides learning; with
`--minutes` beside it, it is one piece of a longer run.
"""

from __future__ import annotations

import argparse
import os
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from tools.nano.data import Rounds
from tools.nano.format import render, train_tokenizer, write_tokenizer
from tools.nano.grow import grown
from tools.nano.model import Nano, Shape, averaged, read_model, write_model
from tools.nano.optim import Muon
from tools.nano.peers import Peers
from tools.nano.scoring import UNSEEN, HeldOut, Scores, decode, solved
from tools.nano.start import start_with_copying
from tools.nano.tasks import held_out, skill_task

HOME = Path(__file__).resolve().parents[2]
TOKENIZER_ROWS = 6000
SAMPLED_PUZZLES = 50
STATE = "state.pt"
KNOWS = 0.45
"""Where in the course of tasks a model starts that has learnt already."""
BEGAN = time.monotonic()
AROUND_LEARNING, AFTER_LEARNING = 30.0, 15.0
"""Seconds that a command of `--seconds` keeps for starting and for the last scores and files."""


class OtherRun(ValueError):
    """The checkpoint is of a run that was started otherwise: going on with it would ignore what is asked for now."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn."""

    minutes: float
    out: Path
    checkpoints: Path
    shape: Shape = field(default_factory=Shape)
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    rate: float = 1.0
    """Share of both rates: less for going on with weights that have learnt, on few ids a step."""
    warmup_steps: int = 60
    cooldown: float = 0.3
    """The last share of the time, in which the rate falls to nothing."""
    save_seconds: float = 60.0
    score_seconds: float = 150.0
    held_out: int = 200
    rows: int = 1024
    budget: int = 3072
    most_steps: int | None = None
    start: Path | None = None
    """A finished model to go on from, with its tokenizer; the optimisers begin anew."""
    grow: bool = False
    """Whether the model to go on from becomes one of `shape`."""
    deadline: float | None = None
    """By `time.monotonic()`: learning stops then, whatever is left to learn."""
    whole: bool = False
    """Whether all there is to learn has to be done by the deadline."""
    keep: float = 0.998
    """What the mean of the last states keeps of itself in a step."""
    compile: bool = False
    device: str = "cpu"
    workers: int = 0
    """Processes that make data ahead of time; 0: the learner makes it."""

    def started(self) -> dict[str, Any]:
        """What makes a run this one; rates, budgets, processes and the device may change when it is resumed. Its data
        are always the same rounds."""
        shape = self.shape if self.start is None or self.grow else read_model(self.start).shape
        start = None if self.start is None else str(self.start.resolve())
        return {"start": start, "minutes": self.minutes, "shape": asdict(shape)}


def make_tokenizer() -> Tokenizer:
    """The same one each time."""
    rng = Random("tokenizer")
    tasks = (skill_task(rng) for _ in range(TOKENIZER_ROWS))
    return train_tokenizer("".join(text for text, _ in render(task.messages, task.tools)) for task in tasks)


class Training:
    """Everything a checkpoint holds."""

    def __init__(self, plan: Plan, peers: Peers | None = None) -> None:
        torch.manual_seed(0)
        self.plan = plan
        self.peers = peers or Peers()
        if plan.start is None:
            self.tokenizer = make_tokenizer()
            self.model = Nano(plan.shape)
            start_with_copying(self.model)
        else:
            self.tokenizer = Tokenizer.from_file(str(plan.start / "tokenizer.json"))
            self.model = read_model(plan.start)
            if plan.grow:
                self.model = grown(self.model, plan.shape)
        self.model.to(plan.device)
        self.mean = deepcopy(self.model)
        hidden = [weight for name, weight in self.model.named_parameters() if weight.ndim == 2 and _is_hidden(name)]
        others = [weight for name, weight in self.model.named_parameters() if weight.ndim != 2 or not _is_hidden(name)]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(hidden, plan.muon_rate),
            torch.optim.AdamW(others, plan.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step, self.round, self.tokens, self.seconds, self.best = 0, self.peers.rank << 32, 0, 0.0, -1.0
        if plan.compile:
            for layer in self.model.layers:
                layer.compile(dynamic=True)  # alike as they are, one stands for all
        self._states = [list(model.state_dict().values()) for model in (self.mean, self.model)]
        self._file = plan.checkpoints / STATE
        self._started = plan.started()  # now: a start folder may be gone, or written over, before the run ends
        if self._file.is_file():
            self._load()

    # ---- steps ----------------------------------------------------------------------------------------------------
    @property
    def progress(self) -> float:
        all_seconds = 60 * self.plan.minutes
        share = self.seconds / all_seconds
        if self.plan.whole and self.plan.deadline is not None:
            share = max(share, 1 - (self.plan.deadline - time.monotonic()) / all_seconds)
        return min(1.0, share)

    def rate(self) -> float:
        """The learning rate as a share of its highest."""
        cooling = min(1.0, (1 - self.progress) / self.plan.cooldown)
        return self.plan.rate * max(0.01, min(1.0, (self.step + 1) / self.plan.warmup_steps, cooling))

    def run(self) -> None:
        """Until the time is up. Rounds of data are numbered, so a resumed run goes on with fresh ones."""
        held = HeldOut(self.tokenizer, self.plan.held_out)
        budget = self.plan.budget // self.peers.count
        rounds = Rounds(self.tokenizer, first=self.round, rows=self.plan.rows, budget=budget, workers=self.plan.workers)
        clock = saved = said = time.monotonic()
        scored = self.seconds
        try:
            while not self.over:
                made = rounds.next(self.progress if self.plan.start is None else max(KNOWS, self.progress))
                self.round = rounds.number
                for batch in made:
                    loss = self._learn(*batch)
                    now = time.monotonic()
                    self.seconds, clock = self.peers.agreed(self.seconds + now - clock), now
                    if now - said > 20:
                        said = now
                        self._say(f"loss {loss.item():.4f} rate {self.rate():.2f} replayed {rounds.replayed}")
                    if now - saved > self.plan.save_seconds:
                        saved = now
                        self.save()
                    if self.seconds - scored > self.plan.score_seconds:
                        scored = self.seconds
                        self._score(held)
                        clock = time.monotonic()
                    if self.over:
                        break
        finally:
            rounds.close()
        self.save()
        self._score(held)

    @property
    def over(self) -> bool:
        """Whether the time or the steps are up."""
        late = self.plan.deadline is not None and time.monotonic() >= self.plan.deadline
        return late or self.progress >= 1.0 or self.step == self.plan.most_steps

    def _learn(self, ids: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        self.model.train()
        self.tokens += ids.numel() * self.peers.count
        ids, places = self._moved(ids), self._moved(made[:, 1:].flatten().nonzero()[:, 0])
        ids = ids.long()
        for optimiser, highest in zip(self.optimisers, (self.plan.muon_rate, self.plan.adam_rate), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = highest * self.rate()
        with torch.autocast(self.plan.device, torch.bfloat16, enabled=self.plan.device != "cpu"):
            features = self.model.features(ids[:, :-1]).flatten(0, 1)[places]
            logits = F.linear(features, self.model.embed_tokens.weight)
        loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten()[places])
        loss.backward()  # type: ignore[no-untyped-call]
        self.peers.average(
            [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            + [experts.load for experts in self.model.experts()]
        )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        for experts in self.model.experts():
            experts.even_out()
        self.step += 1
        self._remember()
        return loss.detach()

    def _moved(self, values: torch.Tensor) -> torch.Tensor:
        """To the device, without waiting for what it has to do first."""
        if self.plan.device == "cpu":
            return values
        return values.pin_memory().to(self.plan.device, non_blocking=True)

    @torch.no_grad()
    def _remember(self) -> None:
        """The mean of the last states, of fewer of them at the start."""
        torch._foreach_lerp_(self._states[0], self._states[1], 1 - min(self.plan.keep, self.step / (self.step + 10)))

    # ---- scores and files -----------------------------------------------------------------------------------------
    def _score(self, held: HeldOut) -> None:
        if not self.peers.leads:
            return
        scores = held.scores(self.mean)
        self._say(line(scores))
        total = sum(score for name, score in scores.items() if "puzzle" not in name)
        if total >= self.best:
            self.best = total
            write_model(self.mean, self.plan.out)

    def _say(self, text: str) -> None:
        if not self.peers.leads:
            return
        print(
            f"{time.strftime('%H:%M:%S')} step {self.step} {self.tokens / 1e6:.2f}M tokens "
            f"{self.seconds / 60:.1f} min: {text}",
            flush=True,
        )

    def save(self) -> None:
        """In one move, so that a stop in the middle leaves the last checkpoint whole."""
        if not self.peers.leads:
            return
        self.plan.checkpoints.mkdir(parents=True, exist_ok=True)
        fresh = self._file.with_suffix(".new")
        torch.save(
            {
                "model": self.model.state_dict(),
                "mean": self.mean.state_dict(),
                "optimisers": [one.state_dict() for one in self.optimisers],
                "tokenizer": self.tokenizer.to_str(),
                "step": self.step,
                "round": self.round,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "best": self.best,
                "started": self._started,
            },
            fresh,
        )
        os.replace(fresh, self._file)

    def _load(self) -> None:
        state = resumable(self.plan)
        self.model.load_state_dict(state["model"])
        self.mean.load_state_dict(state["mean"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.tokenizer = Tokenizer.from_str(state["tokenizer"])  # the tasks it was made from may have changed since
        self.step, self.tokens = state["step"], state["tokens"]
        self.round += state["round"]  # the leader's, whose rounds are numbered from 0
        self.seconds, self.best = state["seconds"], state["best"]
        self._say("resumed")


def resumable(plan: Plan) -> dict[str, Any]:
    """The checkpoint of a plan. Raises `OtherRun` for that of another one."""
    file = plan.checkpoints / STATE
    state: dict[str, Any] = torch.load(file, weights_only=True, map_location=plan.device)
    was, now = state.get("started", {}), plan.started()
    if others := [
        f"{name} is {now[name]}, and was {was.get(name, 'not noted')}"
        for name in now
        if name not in was or was[name] != now[name]
    ]:
        raise OtherRun(
            f"{file} is of another run: {'; '.join(others)}. Give another --checkpoints folder, or remove "
            "this one to begin anew."
        )
    return state


def export(checkpoints: Path, out: Path) -> None:
    """The model folder of what a run has come to by its last checkpoint, also while it goes on. Raises `OtherRun` for
    a checkpoint that does not say what model it is of."""
    state = torch.load(checkpoints / STATE, weights_only=True, map_location="cpu")
    if "started" not in state:
        raise OtherRun(
            f"{checkpoints / STATE} does not say how its run was started: train anew, or take its best model."
        )
    model = Nano(Shape(**state["started"]["shape"]))
    model.load_state_dict(state["mean"])
    write_tokenizer(Tokenizer.from_str(state["tokenizer"]), out)
    write_model(model, out)


def _is_hidden(name: str) -> bool:
    return "embed_tokens" not in name and "router" not in name


def line(scores: Scores) -> str:
    return " ".join(f"{key} {value:.3f}" for key, value in scores.items())


def score_folder(folder: Path, count: int, seed: int, device: str = "cpu") -> Scores:
    """The scores of a finished folder, with puzzles also sampled sixteen times."""
    model = read_model(folder).to(device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    scores = HeldOut(tokenizer, count, seed).scores(model)
    puzzles = held_out("puzzle", min(count, SAMPLED_PUZZLES), seed)
    reached = [False] * len(puzzles)
    for draw in range(16):
        texts = decode(model, tokenizer, puzzles, longest=24, temperature=1.0, seed=draw)
        reached = [was or solved(task, text) for was, task, text in zip(reached, puzzles, texts, strict=True)]
    scores["puzzle_best_of_16"] = sum(reached) / len(puzzles)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, help="time to learn, over all resumed runs; 120, or by --seconds")
    parser.add_argument("--seconds", type=float, help="wall time of this command, all included")
    parser.add_argument("--processes", type=int, default=2, help="each learns with one thread")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; with cuda one process")
    parser.add_argument("--workers", type=int, default=0, help="processes that make data ahead of time")
    parser.add_argument("--rate", type=float, default=1.0, help="share of the usual learning rate")
    parser.add_argument("--cooldown", type=float, default=Plan.cooldown, help="share of the time in which it falls")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="go on from this finished model")
    parser.add_argument("--grow", type=Path, metavar="FOLDER", help="the same, made as large as a new one is")
    parser.add_argument("--compile", action="store_true", help="compile the layers; pays on a GPU")
    parser.add_argument("--budget", type=int, default=3072, help="ids in one step")
    parser.add_argument("--out", type=Path, default=HOME / "agentspeed" / "models" / "nano")
    parser.add_argument("--checkpoints", type=Path, default=HOME / ".checkpoints" / "nano")
    parser.add_argument(
        "--average", type=Path, nargs=2, metavar="FOLDER", help="write the mean of two models of one run to --out"
    )
    parser.add_argument("--share", type=float, default=0.5, help="the second model's share of an average")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="only write the checkpoint's model there")
    parser.add_argument("--score", type=Path, help="only score this folder on held-out tasks of each kind")
    parser.add_argument("--held-out", type=int, default=Plan.held_out, help="how many tasks of each kind are scored")
    parser.add_argument("--seed", type=int, default=UNSEEN, help="tasks of --score; 2 to choose a state by")
    options = parser.parse_args()
    if options.score is not None:
        print(line(score_folder(options.score, options.held_out, options.seed, options.device)))
        return
    if options.export is not None:
        if not (options.checkpoints / STATE).is_file():
            parser.error(f"there is no checkpoint {options.checkpoints / STATE} to export.")
        try:
            export(options.checkpoints, options.export)
        except OtherRun as error:
            parser.error(str(error))
        return
    if options.average is not None:
        write_tokenizer(Tokenizer.from_file(str(options.average[0] / "tokenizer.json")), options.out)
        write_model(
            averaged(read_model(options.average[0]), read_model(options.average[1]), options.share), options.out
        )
        return
    if options.start is not None and options.grow is not None:
        parser.error("give --start or --grow, not both.")
    minutes = options.minutes
    if minutes is None:
        minutes = 120.0 if options.seconds is None else max(1.0, options.seconds - AROUND_LEARNING) / 60
    plan = Plan(
        minutes=minutes,
        out=options.out,
        checkpoints=options.checkpoints,
        rate=options.rate,
        cooldown=options.cooldown,
        score_seconds=max(Plan.score_seconds, 5 * minutes),
        start=options.grow or options.start,
        grow=options.grow is not None,
        held_out=options.held_out,
        deadline=None if options.seconds is None else BEGAN + options.seconds - AFTER_LEARNING,
        whole=options.minutes is None,
        compile=options.compile,
        device=options.device,
        workers=options.workers,
        budget=options.budget,
        rows=max(Plan.rows, options.budget // 12),  # several batches of each length, so that little is padding
    )
    if (plan.checkpoints / STATE).is_file():
        try:
            _ = resumable(plan)
        except OtherRun as error:
            parser.error(str(error))
    if options.processes == 1:
        learn(0, plan, 1, None)
        return
    if options.device != "cpu":
        parser.error("several processes learn on the CPU only; give --processes 1.")
    with TemporaryDirectory() as folder:
        spawn(learn, args=(plan, options.processes, Path(folder) / "meeting"), nprocs=options.processes)  # type: ignore[no-untyped-call]


def learn(rank: int, plan: Plan, count: int, meeting: Path | None) -> None:
    """One process of a training run."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    training = Training(plan, Peers(rank, count, meeting))
    if training.peers.leads:
        write_tokenizer(training.tokenizer, plan.out)
        if not (plan.out / "model.safetensors").is_file():
            write_model(training.model, plan.out)
    training.run()


if __name__ == "__main__":
    main()
