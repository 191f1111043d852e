"""What servers leave to the next one: nothing is lost by who gives up waiting, and nothing stays locked."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentspeed.messages import Assistant, User
from agentspeed.server.openai.responses import Responses
from agentspeed.server.openai.stored import Store, StoredConversation, StoredResponse
from agentspeed.server.options import ServerOptions
from agentspeed.server.saved_sessions import SavedSessions
from agentspeed.server.snapshot_files import Claim, Saved, SnapshotFiles

NO_ENGINE = cast(Any, None)


def _files(folder: Path, most_bytes: int = 1 << 20) -> SnapshotFiles:
    return SnapshotFiles(folder, most_bytes=most_bytes, most_seconds=3600.0)


class _Slow:
    """A folder on a disk that takes its time."""

    def __init__(self, files: SnapshotFiles) -> None:
        self._files = files
        self.folder = files.folder
        self.claimed, self.goes_on = threading.Event(), threading.Event()

    def claim(self, *arguments: Any) -> Claim | None:
        claim = self._files.claim(*arguments)
        self.claimed.set()
        assert self.goes_on.wait(30)
        return claim


def test_a_session_is_there_again_when_the_task_that_wanted_it_was_cancelled_on_the_way(tmp_path: Path) -> None:
    files = _files(tmp_path)
    files.save("sessions", Saved(tenant="a", name="s", data=b"ids"))
    slow = _Slow(files)
    saved = SavedSessions(cast(Any, slow), NO_ENGINE)

    async def wanted() -> None:
        async with saved.restoring("sessions", "a", ["s"]):
            raise AssertionError("nobody waits for it any more")

    async def main() -> None:
        task = asyncio.create_task(wanted())
        _ = await asyncio.to_thread(slow.claimed.wait, 30)
        _ = task.cancel()
        slow.goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert files.has("sessions", "a", "s")


def test_what_was_trimmed_while_it_was_claimed_is_given_back_without_an_error(tmp_path: Path) -> None:
    files = _files(tmp_path, most_bytes=1500)
    files.save("sessions", Saved(tenant="a", name="s", data=b"x" * 1000))
    claim = files.claim("sessions", "a", ["s"])
    files.save("sessions", Saved(tenant="a", name="newer", data=b"x" * 1000))
    assert claim is not None
    claim.give_back()
    assert files.claim("sessions", "a", ["s"]) is None and files.has("sessions", "a", "newer")


def test_a_response_with_a_number_of_any_length_is_saved_and_so_are_those_after_it(tmp_path: Path) -> None:
    stored = {
        number: StoredResponse({"metadata": {"n": n}}, (User("Hi."), Assistant("Hello.")), None)
        for number, n in (("resp_1", 10**30), ("resp_2", 1))
    }

    async def main() -> dict[str, StoredResponse | None]:
        service: Any = SimpleNamespace(saved=SavedSessions(_files(tmp_path), NO_ENGINE), options=ServerOptions(port=0))
        first, second = Responses(service), Responses(service)
        for number, response in stored.items():
            first.stored.put("a", number, response)
        await first.save()
        return {number: await second.find("a", number) for number in stored}

    assert asyncio.run(main()) == stored


def test_a_conversation_whose_response_was_broken_off_is_not_locked_at_the_next_server(tmp_path: Path) -> None:
    async def main() -> StoredConversation | None:
        service: Any = SimpleNamespace(saved=SavedSessions(_files(tmp_path), NO_ENGINE), options=ServerOptions(port=0))
        first, second = Responses(service), Responses(service)
        first.conversations.put("a", "conv_1", StoredConversation("conv_1", 0, {}, busy=True))
        await first.save()
        return await second.find_conversation("a", "conv_1")

    found = asyncio.run(main())
    assert found is not None and not found.busy


def test_a_broken_state_of_a_conversation_does_not_keep_a_shorter_one_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _files(tmp_path)
    for name in ("long", "short"):
        files.save("history", Saved(tenant="a", name=name, data=name.encode()))
    (broken,) = (path for path in tmp_path.glob("*/history/*") if b"long" in path.read_bytes())
    _ = broken.write_bytes(b"nothing")
    put: list[str] = []

    async def keep(session: Any, conversation: Any) -> None:
        put.append(session)

    def whole(data: bytes, engine: Any, tenant: str) -> Any:
        return data.decode()

    monkeypatch.setattr("agentspeed.server.saved_sessions.session_of", whole)
    saved = SavedSessions(files, NO_ENGINE)
    conversation = cast(Any, SimpleNamespace(tenant="a"))
    asyncio.run(saved.recall(cast(Any, SimpleNamespace(put=keep)), conversation, ["long", "short"]))
    assert put == ["short"]
    assert broken.exists() and not files.has("history", "a", "short")


def test_stored_values_of_one_tenant_push_out_none_of_another() -> None:
    store = Store[int](2)
    store.put("a", "1", 1)
    for number in range(5):
        store.put("b", str(number), number)
    assert store.get("a", "1") == 1
    assert [store.get("b", str(number)) for number in range(5)] == [None, None, None, 3, 4]
    assert store.newest(1) == [("a", "1", 1), ("b", "4", 4)]
    assert store.pop("b", "4") == 4 and store.get("b", "4") is None
