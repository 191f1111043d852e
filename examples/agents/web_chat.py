"""A web chat: one session for each conversation, a run streamed as server-sent events, readers that may leave.

The page is `examples/agents/web_chat.html`. A conversation's session is opened by its first request, goes on with the
next ones and closes itself when nobody came back for ten minutes. A reader that goes away in the midst of an answer
cancels it, and the conversation is as it was before.

Run: `python examples/agents/web_chat.py` (a client of its own talks to it), or, for a browser, with `--serve`
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from agentspeed import Engine, Session, errors, tool

IDLE_SECONDS = 600.0


@tool
async def get_weather(city: str) -> dict[str, str | int]:
    """Get the weather for a city."""
    await asyncio.sleep(0.3)
    return {"sky": "clear", "temp": 21 if city == "Oslo" else 28}


@dataclass(frozen=True)
class Conversation:
    session: Session
    turn: asyncio.Lock
    """Held by the request that is answered: a second one waits."""


class Conversations:
    """Those of an application, by the number that a browser keeps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, Conversation] = {}
        self._opening = asyncio.Lock()

    async def get(self, number: str) -> Conversation:
        async with self._opening:
            self._known = {name: one for name, one in self._known.items() if one.session.state == "open"}
            if number not in self._known:
                session = await self._engine.session(tools=[get_weather], idle_timeout=IDLE_SECONDS).open()
                self._known[number] = Conversation(session, asyncio.Lock())
            return self._known[number]

    async def close(self) -> None:
        for one in self._known.values():
            await one.session.close()


async def chat(request: Request) -> Response:
    """One question of a conversation; its events, and at the end what the answer cost."""
    conversations: Conversations = request.app.state.conversations
    conversation = await conversations.get(request.path_params["number"])
    question = (await request.body()).decode()
    try:
        run = conversation.session.stream_run(question, max_tokens=128, max_turns=4)
    except errors.InputError as error:  # of the question: its length, half a character
        return Response(str(error), status_code=400)

    async def body() -> AsyncIterator[bytes]:
        try:
            async with conversation.turn, run:
                async for event in run:
                    yield b"data: " + msgspec.json.encode(event) + b"\n\n"
                usage = run.result().usage
                yield sent({"type": "Cost", "resumed": usage.resumed, "computed": usage.computed})
        except errors.AgentspeedError as error:  # what a run raises
            yield sent({"type": "Error", "message": str(error)})

    return StreamingResponse(body(), media_type="text/event-stream")


def sent(event: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def application(engine: Engine) -> Starlette:
    async def page(_: Request) -> Response:
        return FileResponse(Path(__file__).with_suffix(".html"))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with engine:
            app.state.conversations = Conversations(engine)
            yield
            await app.state.conversations.close()

    return Starlette(routes=[Route("/", page), Route("/chat/{number}", chat, methods=["POST"])], lifespan=lifespan)


async def ask(client: httpx.AsyncClient, number: str, question: str, most: int | None = None) -> str:
    """The answer's text; `most`: leaves after so many events."""
    print(f"{number} > {question}")
    text, seen = "", 0
    async with client.stream("POST", f"/chat/{number}", content=question) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            event, seen = json.loads(line.removeprefix("data: ")), seen + 1
            match event["type"]:
                case "TextDelta":
                    text += event["text"]
                case "ToolStarted":
                    print(f"{number}     calls {event['call']['name']}({event['call']['arguments']})")
                case "Cost":
                    print(f"{number} < {text[:80]}")
                    print(f"{number}     {event['resumed']} tokens resumed, {event['computed']} computed")
                case "Error":
                    print(f"{number}     {event['message'][:80]}")
            if seen == most:
                print(f"{number}     leaves after {seen} events")
                break
    return text


async def main(model: str | None = None) -> list[str]:
    """Two conversations, one of which is left in the midst of an answer and goes on."""
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(application(Engine(model)), log_level="error"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        _ = await ask(client, "one", "What is the weather in Oslo?", most=3)
        answers = await asyncio.gather(
            ask(client, "one", "What is the weather in Oslo?"), ask(client, "two", "Say hi.")
        )
        answers.append(await ask(client, "one", "Say hi."))
    server.should_exit = True
    await serving
    return answers


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        uvicorn.run(application(Engine(sys.argv[2] if sys.argv[2:] else None)), port=8080)
    else:
        _ = asyncio.run(main(sys.argv[1] if sys.argv[1:] else None))
