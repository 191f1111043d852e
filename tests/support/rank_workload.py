"""One workload with everything that a step can be made of, for engines of which all must draw the same."""

from __future__ import annotations

import random

from agentspeed_engine.protocol import messages as wire
from tests.support.engine_client import Front, TurnRecord

OPTIONS = {
    "dtype": "float64",
    "device": "cpu",
    "page_tokens": 16,
    "context_limit": 240,
    "pages": 30,
    "firm_pages": 0,
    "host_slots": 120,
    "host_saves": "always",
    "prefill_chunk": 96,
    "threads": 1,
    "check_every_step": True,
}
"""Of a pool with room for two of the workload's five sessions."""
SAMPLINGS = (
    wire.Sampling(logprobs=3),
    wire.Sampling(temperature=1.3, top_k=200, top_p=0.98, min_p=0.001, logprobs=2),
    wire.Sampling(temperature=0.9, top_p=0.8),
    wire.Sampling(temperature=1.1, logprobs=0, repetition_penalty=1.2, frequency_penalty=0.3, logit_bias=((65, 2.0),)),
)
GRAMMAR = wire.Grammar(source='{"grammars": [{"lark_grammar": "start: /[a-f]{6}[0-9]+/"}]}')


def drawn(front: Front, *, seed: int = 0) -> list[tuple[list[int], list[float]]]:
    """(ids, logprobs) of every turn: sessions that push each other out of the pool and come back from the host, turns
    that run together and are preempted, forks at rest and of a running turn, rewinds, a grammar."""
    noise = random.Random(seed)
    turns: list[TurnRecord] = []
    sessions = [front.open() for _ in range(5)]
    together = [
        front.start(session, [noise.randrange(256) for _ in range(60)], max_tokens=44, sampling=sampling, seed=seed)
        for session, sampling in zip(sessions, (*SAMPLINGS, SAMPLINGS[1]), strict=True)
    ]
    front.finish(*together)
    turns += together
    for session in sessions:  # at rest, and due only much later: each is saved when another needs the pages
        front.ask(wire.Expect(request=front.number(), branch=session, seconds=60.0), wire.LeaseAnswer)
    for number, session in enumerate((*sessions, *sessions)):
        new = [noise.randrange(256) for _ in range(5)]
        turns.append(front.generate(session, new, max_tokens=4, sampling=SAMPLINGS[number % 4], seed=number))
    trunk = sessions[1]
    _ = front.rewind(trunk, 71)
    children = front.fork(trunk, 3)
    together = [
        front.start(child, [number], max_tokens=16, sampling=SAMPLINGS[1], seed=number)
        for number, child in enumerate(children)
    ]
    front.finish(*together)
    turns += together
    turns.append(front.generate(children[2], [7], max_tokens=10, sampling=SAMPLINGS[1], grammar=GRAMMAR, seed=3))
    running = front.start(children[0], [3], max_tokens=16, sampling=SAMPLINGS[3], seed=5)
    while len(running.ids) < 4:
        front.step()
    (child,) = front.fork(children[0])
    _ = front.rewind(child, 80)  # how far the turn was is chance
    turns.append(front.generate(child, [9], max_tokens=6, sampling=SAMPLINGS[0], seed=6))
    front.finish(running)
    turns.append(running)
    for branch in (*sessions, *children, child):
        _ = front.end(branch)
    return [(turn.ids, turn.logprobs) for turn in turns]
