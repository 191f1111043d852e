"""Rollouts for reinforcement learning: each prompt has a group of forks, rewarded relative to the group, in a file.

The prompt is computed once for its group. What is written are the very ids that were computed on, which of them the
model drew, and their log-probabilities in the distribution that drew them: the behaviour policy, so nothing is
tokenised or scored again. Lines have the fields that verl's agent loops give; `for_trl` makes what a `rollout_func` of
TRL's GRPOTrainer returns. At the end the best of the last group becomes its session.

Run: `python examples/agents/rollouts.py [MODEL FOLDER]`
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import anyio

from agentspeed import Engine, Sampling, Session, ToolMessage, User, tool

GROUP = 8
SUMS = ((417, 256), (38, 54), (986, 75))


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def reward_of(s: Session, wanted: int) -> float:
    """Half of it for a call that gave the sum, half for an answer that says it."""
    called = any(isinstance(message, ToolMessage) and message.text == str(wanted) for message in s.messages)
    return 0.5 * called + 0.5 * (str(wanted) in s.messages[-1].text)


def rollout(s: Session, prompt: str, reward: float) -> dict[str, Any]:
    """One line, as verl's `AgentLoopOutput` names it. The response has the model's ids (mask 1) and those of tools and
    the template (mask 0), whose log-probabilities count for nothing."""
    path = s.trajectory()
    first = path.made.index(True)
    logprobs = [own if made else 0.0 for own, made in zip(path.draw_logprobs, path.made, strict=True)]
    return {
        "prompt_ids": path.ids[:first],
        "response_ids": path.ids[first:],
        "response_mask": [int(made) for made in path.made[first:]],
        "response_logprobs": logprobs[first:],
        "reward_score": reward,
        "num_turns": len(s.messages),
        "extra_fields": {"prompt": prompt, "session": s.id},
    }


def relative(rewards: list[float]) -> list[float]:
    """Each reward less the group's mean, over its deviation (Shao et al. 2024, GRPO); 0 where all are the same."""
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(one - mean) / deviation if deviation else 0.0 for one in rewards]


def for_trl(rollouts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What `GRPOTrainer(rollout_func=...)` is given back: lists by name; what it does not know, such as `reward`, goes
    on to its reward functions."""
    names = {
        "prompt_ids": "prompt_ids",
        "response_ids": "completion_ids",
        "response_logprobs": "logprobs",
        "response_mask": "env_mask",
        "reward_score": "reward",
    }
    return {theirs: [one[ours] for one in rollouts] for ours, theirs in names.items()}


async def group(s: Session, one: int, other: int) -> list[dict[str, Any]]:
    """The rollouts of a prompt, all of them forks of `s`, whose best one `s` becomes."""
    prompt = f"What is {one} plus {other}?"
    _ = await s.add(User(prompt), prefill=True)
    async with s.fork(GROUP) as branches:
        async with anyio.create_task_group() as tasks:
            for branch in branches:
                _ = tasks.start_soon(attempt, branch)
        rewards = [reward_of(branch, one + other) for branch in branches]
        found = [rollout(branch, prompt, reward) for branch, reward in zip(branches, rewards, strict=True)]
        for line, advantage in zip(found, relative(rewards), strict=True):
            line["extra_fields"]["advantage"] = advantage
        drawn, computed = (sum(getattr(one.usage, name) for one in branches) for name in ("drawn", "computed"))
        print(
            f"{prompt:24} rewards {' '.join(f'{reward:g}' for reward in rewards)}; "
            f"{drawn} tokens drawn, {computed} computed by all"
        )
        await s.adopt(branches[rewards.index(max(rewards))])
    return found


async def attempt(branch: Session) -> None:
    _ = await branch.run(max_tokens=64, max_turns=3)


async def main(model: str | Engine | None = None) -> list[dict[str, Any]]:
    """Returns the rollouts."""
    found: list[dict[str, Any]] = []
    policy = Sampling(temperature=3.0)
    async with model if isinstance(model, Engine) else Engine(model) as engine:
        for one, other in SUMS:
            async with engine.session(tools=[add], sampling=policy, record_logprobs=True, seed=5) as s:
                found += await group(s, one, other)
                answer = s.messages[-1].text
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rollouts.jsonl"
        _ = file.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in found))
        print(
            f"{len(found)} rollouts in {file.stat().st_size} bytes of {file.name}; "
            f"the best of the last group: {shorten(answer, 30)}"
        )
    shape = for_trl(found)
    print(f"for TRL: {', '.join(shape)}, {sum(map(sum, shape['env_mask']))} ids of the model's")
    return found


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
